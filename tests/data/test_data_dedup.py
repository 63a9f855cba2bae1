"""foveate.data.dedup: what is found by MinHash is what counting finds, in any number of chunks; which one is kept."""

from __future__ import annotations

import random

import numpy as np
import pytest

import corpus_toys as toys
import foveate.data
from foveate.data import corpus
from foveate.data.shingles import MinHash, WordHashes, bands_and_rows, ngrams, shingles, words


def dedup(tmp_path, texts, **options):
    source = toys.write(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    found = foveate.data.dedup(source, tmp_path / "o.jsonl", **({"workers": 1, "overwrite": True} | options))
    removed = toys.read(tmp_path / "o.removed.jsonl")
    return [row["text"] for row in toys.read(tmp_path / "o.jsonl")], removed, found


def changed(text, share, seed):
    """The text with some of its words replaced."""
    rng = random.Random(seed)
    return " ".join(f"new{rng.randrange(10**6)}" if rng.random() < share else word for word in text.split())


def jaccard(a, b, n=5):
    def grams(text):
        found = words(text)
        return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}

    return len(grams(a) & grams(b)) / len(grams(a) | grams(b))


def test_equal_documents_differ_in_case_and_punctuation_alone(tmp_path):
    a, b = toys.prose(1), toys.prose(2)
    kept, removed, found = dedup(
        tmp_path, [a, b, a.upper(), a.replace(".", " !"), b + "\n", "", "..", "!!"], near=False
    )
    assert kept == [a, b, "", "..", "!!"]
    places = [(row["reason"], row["place"].split(" of ")[0], row["kept"].split(" of ")[0]) for row in removed]
    assert places == [("duplicate", "row 3", "row 1"), ("duplicate", "row 4", "row 1"), ("duplicate", "row 5", "row 2")]
    assert found["groups"] == 2 and found["removed"] == 3


def test_near_duplicates_are_those_of_the_jaccard_similarity(tmp_path):
    """Pairs from 0.3 to 1: all beyond the estimate's error are decided as the exact similarity decides."""
    bases = [toys.prose(seed, 40) for seed in range(40)]
    pairs = [changed(base, i / 40 * 0.2, i) for i, base in enumerate(bases)]
    similar = [jaccard(a, b) for a, b in zip(bases, pairs)]
    assert min(similar) < 0.4 and max(similar) == 1.0
    kept, removed, _ = dedup(tmp_path, [*bases, *pairs], permutations=256)
    assert kept[:40] == bases
    for text, similarity in zip(pairs, similar):
        if similarity > 0.9:
            assert text not in kept[40:], similarity
        if similarity < 0.7:
            assert text in kept[40:], similarity
    for row in removed:
        if row["reason"] == "near-duplicate":
            i = int(row["kept"].split()[1]) - 1
            assert row["similarity"] == pytest.approx(jaccard(bases[i], row["row"]["text"]), abs=0.12)


def test_signatures_estimate_and_bands_suit_the_threshold():
    hashes, minhash = WordHashes(), MinHash(512, 3)
    for seed in range(5):
        a = toys.prose(seed, 60)
        b = changed(a, 0.04 * seed, seed)
        one, other = (minhash(shingles(hashes(words(text)), 5)) for text in (a, b))
        assert (one == other).mean() == pytest.approx(jaccard(a, b), abs=0.1)
    for threshold in (0.5, 0.8, 0.9):
        bands, rows = bands_and_rows(threshold, 128)
        above, below = (1 - (1 - s**rows) ** bands for s in (threshold + 0.1, threshold - 0.2))
        assert bands * rows <= 128 and above > 0.85 and below < 0.5


def test_ngrams_depend_on_words_and_order():
    hashes = WordHashes()
    a, b, c = (hashes(text.split()) for text in ("a b c d", "b a c d", "a b c d"))
    assert np.array_equal(ngrams(a, 3), ngrams(c, 3)) and not np.isin(ngrams(a, 3), ngrams(b, 3)).any()
    assert len(ngrams(a, 5)) == 0 and len(shingles(a, 5)) == 1 and len(shingles(a[:0], 5)) == 0
    assert words("Don't stop_me; 日本 42!") == ["don", "t", "stop", "me", "日", "本", "42"]


def test_chunks_workers_and_the_seed(tmp_path, monkeypatch):
    texts = [toys.prose(seed % 30, 20) for seed in range(45)] + [
        changed(toys.prose(seed, 20), 0.01, seed) for seed in range(30)
    ]
    results = []
    for rows, count in ((1000, 1), (7, 1), (7, 2)):
        monkeypatch.setattr(corpus, "CHUNK_ROWS", rows)
        kept, removed, _ = dedup(tmp_path, texts, workers=count)
        results.append((kept, removed))
    assert results[0] == results[1] == results[2] and 30 <= len(results[0][0]) < 45


def test_which_one_is_kept(tmp_path):
    short = toys.prose(1, 30)
    long = short + " " + toys.sentence(random.Random(0))
    assert jaccard(short, long) > 0.9
    assert dedup(tmp_path, [short, long])[0] == [short]
    kept, removed, _ = dedup(tmp_path, [short, long, short], keep="longest")
    assert kept == [long] and {row["kept"].split()[1] for row in removed} == {"2"}


def test_a_chain_is_one_group(tmp_path):
    a = toys.prose(1, 60)
    chain = [a]
    for i in range(16):
        chain.append(changed(chain[-1], 0.005, i))
    assert jaccard(chain[0], chain[-1]) < 0.7 and min(map(jaccard, chain, chain[1:])) > 0.9
    assert dedup(tmp_path, chain, permutations=256)[0] == [a]


def test_paragraphs(tmp_path):
    a, b, c = (toys.prose(seed, 3) for seed in range(3))
    notice = "All texts on these pages were written by the people of the village and may be read."
    texts = [f"{a}\n{notice}\nshort line", f"{notice}\n\n{b}\nshort line", f"{c}\n{notice.upper()}", notice]
    kept, removed, found = dedup(tmp_path, texts, unit="paragraph", near=False)
    assert kept == [texts[0], f"{b}\nshort line", f"{c}\n"]
    cuts = [row for row in removed if row["reason"] == "duplicate-paragraph"]
    assert [row["text"] for row in cuts] == [notice, notice.upper(), notice]
    assert [row["reason"] for row in removed if "row" in row] == ["duplicate-paragraphs"] and found["kept"] == 3
    near = changed(toys.prose(9, 40).replace("\n", " "), 0.005, 1)
    kept, removed, _ = dedup(tmp_path, [toys.prose(9, 40).replace("\n", " "), f"{near}\n{b}"], unit="paragraph")
    assert kept[1] == b and removed[0]["reason"] == "near-duplicate-paragraph"


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"unit": "page"}, "unit='page' must be one of document, paragraph"),
        ({"keep": "best"}, "keep='best' one of first, longest"),
        ({"threshold": 0}, "threshold=0 must be above 0"),
        ({"permutations": 0}, "permutations=0 must be 1 or more"),
    ],
)
def test_wrong_options(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        dedup(tmp_path, ["a"], **options)
