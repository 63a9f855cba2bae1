"""foveate.data.clean: each rule of Gopher, C4 and FineWeb at its published threshold, lines, and repaired Unicode."""

from __future__ import annotations

import random

import pytest

import corpus_toys as toys
import foveate.data
from foveate.data.cleaning import Clean, tidy
from foveate.data.rules import RULES
from foveate.data.rules.features import Features
from foveate.data.rules.lines import filter_lines, sentences
from foveate.files.data_files import Row

PROSE = toys.prose(5, 30)
LINES = PROSE.split("\n")


def outcome(text, **options):
    return Clean(**({"unicode": False, "whitespace": False} | options))([Row({"text": text}, "row 1 of x")])[0]


def test_prose_keeps_all_rules():
    for seed in range(20):
        assert outcome(toys.prose(seed), rules=["all"], without=[]).reason is None


def words(count):
    rng = random.Random(count)
    return " ".join(toys.sentence(rng)[:-1] for _ in range(count // 18 + 1)).split(" ")[:count]


# For each rule a document that just keeps it, and one that just breaks it, by the published number.
CASES = {
    "gopher-min-words": (" ".join(words(50)), " ".join(words(49))),
    "gopher-max-words": (" ".join(words(20) * 5000), " ".join([*words(20) * 5000, "one"])),
    "gopher-min-word-length": ("abc " * 60, "abc " * 59 + "ab"),
    "gopher-max-word-length": ("abcdefghij " * 60, "abcdefghij " * 59 + "abcdefghijk"),
    "gopher-hashes": ("word " * 60 + "#" * 6, "word " * 60 + "#" * 7),
    "gopher-ellipses": ("word " * 60 + "... " * 4 + "… " * 2, "word " * 60 + "... " * 4 + "… " * 3),
    "gopher-bullet-lines": ("• a line\n" * 9 + "a line", "• a line\n" * 10),
    "gopher-ellipsis-lines": ("so it goes on...\n" * 3 + "a line\n" * 7, "so it goes on…\n" * 4 + "a line\n" * 6),
    "gopher-alphabetic-words": ("a1 " * 8 + "12 " * 2, "a1 " * 7 + "12 " * 3),
    "gopher-stop-words": ("The sea and sun", "The sea the sun"),
    "gopher-duplicate-lines": ("\n".join("abcdefgaaa"), "\n".join("abcdefaaaa")),
    "gopher-duplicate-paragraphs": ("\n\n".join("abcdefgaaa"), "\n\n".join("abcdefaaaa")),
    "gopher-duplicate-line-characters": ("aaaa\n" * 2 + "bbbbbbbbbbbb", "aaaa\n" * 2 + "bbbbbbbbbbb"),
    "gopher-duplicate-paragraph-characters": ("aaaa\n\n" * 2 + "bbbbbbbbbbbb", "aaaa\n\n" * 2 + "bbbbbbbbbbb"),
    "gopher-top-2-gram": ("a b X a b " + "c" * 15, "a b X a b " + "c" * 14),
    "gopher-top-3-gram": ("a b c X a b c " + "d" * 27, "a b c X a b c " + "d" * 26),
    "gopher-top-4-gram": ("a b c d X a b c d " + "e" * 41, "a b c d X a b c d " + "e" * 40),
    **{
        f"gopher-duplicate-{n}-grams": (
            f"{' '.join('abcdefghij'[:n])} X {' '.join('abcdefghij'[:n])} " + "z" * (limit - 2 * n - 1),
            f"{' '.join('abcdefghij'[:n])} X {' '.join('abcdefghij'[:n])} " + "z" * (limit - 2 * n - 2),
        )
        for n, limit in {5: 67, 6: 86, 7: 108, 8: 134, 9: 164, 10: 200}.items()
    },
    "fineweb-line-punctuation": ("a line.\n" * 3 + "a line\n" * 22, "a line.\n" * 2 + "a line\n" * 23),
    "fineweb-duplicate-line-characters": ("aaaa\n" * 2 + "b" * 32, "aaaa\n" * 2 + "b" * 31),
    "fineweb-short-lines": ("x" * 29 + "\n" + "y" * 30, "\n".join(["x" * 29] * 3 + ["y" * 30])),
    "c4-lorem-ipsum": ("lorem et ipsum", "and Lorem Ipsum dolor"),
    "c4-curly-brackets": ("a (b) [c]", "if (a) { b }"),
}


def test_each_rule_has_its_cases():
    assert list(CASES) == [rule.name for rule in RULES]


@pytest.mark.parametrize("name", CASES)
def test_rules_at_their_published_thresholds(name):
    kept, broken = CASES[name]
    assert outcome(kept, rules=[name]).reason is None
    found = outcome(broken, rules=[name])
    assert found.reason == name and found.row is None and set(found.note) == {"value", "threshold"}
    assert outcome(broken, rules=["all"], without=["all"]).reason is None  # each can be switched off
    threshold = {"least": -1, "most": 10**9}[next(rule.kind for rule in RULES if rule.name == name)]
    assert outcome(broken, rules=[name], thresholds={name: threshold}).reason is None


def test_repeated_ngrams_against_a_plain_count():
    """The numpy counts are those of loops over tuples of words."""
    rng = random.Random(3)
    for _ in range(40):
        text = " ".join(rng.choice(["a", "bb", "ccc", "dd", "e", "ffff", "g"]) for _ in range(rng.randrange(2, 60)))
        made = text.split()
        total = sum(map(len, made))
        for n in range(2, 11):
            grams = [tuple(made[i : i + n]) for i in range(len(made) - n + 1)]
            most = max(map(grams.count, grams), default=0)
            top = max((len("".join(g)) for g in grams if grams.count(g) == most), default=0) * most if most > 1 else 0
            covered = {i + j for i, g in enumerate(grams) if grams.count(g) > 1 for j in range(n)}
            features = Features(text)
            assert features.top_ngram(n) == pytest.approx(top / total)
            assert features.duplicate_ngrams(n) == pytest.approx(sum(len(made[i]) for i in covered) / total)


@pytest.mark.parametrize(
    "line, rule",
    [
        ("w" * 1001 + " is a word that is too long.", "c4-long-words"),
        ("this line has no full stop at its end", "c4-terminal-punctuation"),
        ("and so it went on and on...", "c4-terminal-punctuation"),
        ("Only four words here.", "c4-words-in-line"),
        ("Please enable JavaScript to see this page.", "c4-javascript"),
        ("This site uses cookies to be of use to you.", "c4-policy"),
        ("Skip to main content", "boilerplate-navigation"),
        ("Share on Facebook", "boilerplate-navigation"),
        ("Home | About | Contact", "boilerplate-navigation"),
        ("© 2024 Some Company Ltd.", "boilerplate-navigation"),
        ("12 comments", "boilerplate-navigation"),
        ("Page 3 of 7", "boilerplate-navigation"),
    ],
)
def test_lines_that_go(line, rule):
    text = f"{LINES[0]}\n{line}\n\n{LINES[1]}"
    assert filter_lines(text, {rule}) == (f"{LINES[0]}\n\n{LINES[1]}", [(rule, line)])
    assert filter_lines(text, set()) == (text, [])


@pytest.mark.parametrize(
    "line",
    [
        "He went home and read more of the book that night.",
        "Contact with the other ship was lost before the evening.",
        "Copyright is a subject for lawyers; the rest of us have to live with what they decide about it, year after year.",
        "The next page of the letter was missing.",
    ],
)
def test_prose_about_navigation_stays(line):
    assert filter_lines(line, {"boilerplate-navigation"}) == (line, [])


def test_citations_and_sentences():
    assert (
        filter_lines("A fact.[3] Another[edit] one[citation needed]. a[i] stays", {"c4-citations"})[0]
        == "A fact. Another one. a[i] stays"
    )
    assert sentences("One. Two? Three! He paid 3.50 and left. “Four.” Five") == 5
    assert (
        outcome("\n".join(["One sentence is all of it, for what it is worth."] * 2), rules=["c4"]).reason
        == "c4-min-sentences"
    )


def test_what_lines_are_cut_is_in_the_removed_file(tmp_path):
    text = f"Home | About\n{PROSE}\nShare on Facebook"
    source = toys.write(tmp_path / "in.jsonl", [{"text": text}])
    found = foveate.data.clean(source, tmp_path / "o.jsonl", unicode=False, workers=1)
    assert toys.read(tmp_path / "o.jsonl") == [{"text": PROSE}]
    assert [(r["reason"], r["text"]) for r in toys.read(tmp_path / "o.removed.jsonl")] == [
        ("c4-words-in-line", "Home | About"),
        ("c4-words-in-line", "Share on Facebook"),
    ]
    assert found["changed"] == 1 and found["labels"] == {"c4-words-in-line": 1}


def test_white_space():
    assert tidy("a  b \n\n\n\nc\t\n  d  e") == "a b\n\nc\n d e"
    assert tidy("a b\n\nc") == "a b\n\nc"


@pytest.mark.parametrize(
    "broken, repaired",
    [
        ("The cafÃ© was closed.", "The café was closed."),
        ("donâ€™t", "don’t"),
        ("e\u0301tude", "étude"),
        ("zero\u200bwidth and \ufeffmark", "zerowidth and mark"),
        ("a &amp; b &eacute;", "a & b é"),
        ("line\r\nend\rs", "line\nend\ns"),
        ("bell\x07", "bell"),
        ("“quoted” text — stays, 日本語 too 🙂", "“quoted” text — stays, 日本語 too 🙂"),
        ("plain text < > & stays", "plain text < > & stays"),
    ],
)
def test_unicode_is_repaired(broken, repaired):
    pytest.importorskip("ftfy")
    from foveate.data.cleaning import repair

    assert repair(broken) == repaired
