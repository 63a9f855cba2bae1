"""foveate.data: language, decontaminate, mix, split, stats."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

import corpus_toys as toys
import foveate.data
from foveate.data import corpus
from foveate.data.corpus import Corpus
from foveate.data.mixing import Mixture, interleave

ROWS = toys.documents(300)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK_ROWS", 31)


@pytest.fixture
def source(tmp_path):
    return toys.write(tmp_path / "in.jsonl", ROWS)


# ---- language ----------------------------------------------------------------------------------------------------------------

SENTENCES = {
    "en": "The children walked slowly through the quiet fields and watched the boats come home.",
    "de": "Die Kinder gingen langsam durch die stillen Felder und sahen den Booten zu, die nach Hause kamen.",
    "fr": "Les enfants marchaient lentement à travers les champs et regardaient les bateaux qui rentraient au port.",
    "es": "Los niños caminaban despacio por los campos tranquilos y miraban los barcos que volvían a casa.",
    "ru": "Дети медленно шли по тихим полям и смотрели, как лодки возвращаются домой.",
    "zh": "孩子们慢慢地走过安静的田野，看着船只回到港口，天已经黑了，大家都回家吃饭。",
    "ja": "子供たちは静かな野原をゆっくり歩いて、船が帰ってくるのを見ていました。",
}


def test_languages(tmp_path):
    pytest.importorskip("py3langid")
    source = toys.write(tmp_path / "in.jsonl", [*({"text": text} for text in SENTENCES.values()), {"text": "12 :-)"}])
    found = foveate.data.language(source, tmp_path / "o.jsonl", workers=1)
    rows = toys.read(tmp_path / "o.jsonl")
    assert [row["language"] for row in rows] == [*SENTENCES, "und"]
    assert all(0.65 < row["language_score"] <= 1 for row in rows[:-1]) and rows[-1]["language_score"] == 0
    assert found["labels"] == {f"is-{code}": 1 for code in [*SENTENCES, "und"]}
    found = foveate.data.language(source, tmp_path / "k.jsonl", keep=["de", "und"], label=False, workers=1)
    assert toys.read(tmp_path / "k.jsonl") == [{"text": SENTENCES["de"]}, {"text": "12 :-)"}]
    assert found["reasons"]["language-en"] == 1 and toys.read(tmp_path / "k.removed.jsonl")[0]["language"] == "en"
    with pytest.raises(ValueError, match="xx is no language that can be told; the codes are und, "):
        foveate.data.language(source, tmp_path / "x.jsonl", keep=["xx"])


# ---- decontaminate -----------------------------------------------------------------------------------------------------------


def test_documents_that_share_thirteen_words(tmp_path, source):
    words = ROWS[7]["text"].split()
    evaluation = toys.write(
        tmp_path / "test.jsonl",
        [
            {"question": " ".join(words[40:53]).upper() + " ... ?", "answer": "no"},  # 13 words
            {"question": " ".join(words[60:72]) + " instead", "answer": "no"},  # 12 of them
            {"question": " ".join(ROWS[9]["text"].split()[:8]), "answer": "no"},  # 8, as a whole
            {"question": " ".join(ROWS[11]["text"].split()[:7]), "answer": "no"},  # too short
        ],
    )
    found = foveate.data.decontaminate(
        source, tmp_path / "o.jsonl", against=evaluation, workers=2, hits=tmp_path / "hits.json"
    )
    removed = toys.read(tmp_path / "o.removed.jsonl")
    assert [row["row"]["id"] for row in removed] == [7, 9] and found["kept"] == 298
    assert removed[0]["evaluation"] == {f"row 1 of {evaluation}": 1}
    hits = {f"row 1 of {evaluation}": 1, f"row 3 of {evaluation}": 1}
    assert json.loads((tmp_path / "hits.json").read_text()) == hits
    assert (found["evaluation_rows"], found["evaluation_rows_hit"], found["evaluation_texts_too_short"]) == (4, 2, 5)
    found = foveate.data.decontaminate(source, tmp_path / "p.jsonl", against=evaluation, n=12, workers=1)
    assert found["removed"] == 2 and found["evaluation_rows_hit"] == 3
    with pytest.raises(ValueError, match="no text of at least 8 words in answer; lower least"):
        foveate.data.decontaminate(source, tmp_path / "q.jsonl", against=evaluation, fields=["answer"])


def test_matches_are_cut_with_their_surroundings(tmp_path):
    before, match, after = toys.prose(1, 12), toys.prose(2, 1), toys.prose(3, 12)
    source = toys.write(
        tmp_path / "in.jsonl", [{"text": f"{before} {match} {after}"}, {"text": match}, {"text": after}]
    )
    evaluation = toys.write(tmp_path / "test.txt", [{"text": match}])
    found = foveate.data.decontaminate(source, tmp_path / "o.jsonl", against=evaluation, action="cut", workers=1)
    first, last = toys.read(tmp_path / "o.jsonl")
    assert last == {"text": after} and first["text"] == f"{before[:-199]}\n\n{after[198:]}"
    cut, whole = toys.read(tmp_path / "o.removed.jsonl")
    assert (cut["reason"], whole["reason"]) == ("contaminated-cut", "contaminated") and match in cut["text"]
    assert found["evaluation_rows_hit"] == 1 and found["kept"] == 2


# ---- split -------------------------------------------------------------------------------------------------------------------


def sides(folder, *names):
    return {name: [row["id"] for row in toys.read(folder / f"{name}.jsonl")] for name in names}


def test_no_document_changes_sides(tmp_path, source):
    shares = {"train": 0.8, "test": 0.2}
    found = foveate.data.split(source, tmp_path / "a", shares=shares, workers=2)
    first = sides(tmp_path / "a", "train", "test")
    assert sorted(first["train"] + first["test"]) == list(range(300)) and 35 < len(first["test"]) < 85
    assert found["outputs"] == {str(tmp_path / "a" / f"{name}.jsonl"): len(ids) for name, ids in first.items()}
    assert first["train"] != sorted(first["train"])  # shuffled
    more = toys.write(
        tmp_path / "more.jsonl", [*({"id": 1000 + r["id"], "text": r["text"] + "!"} for r in ROWS), *ROWS[::-2]]
    )
    foveate.data.split(more, tmp_path / "b", shares=shares, workers=1, shuffle=False)
    second = sides(tmp_path / "b", "train", "test")
    assert {i for i in second["test"] if i < 300} == set(first["test"]) & {r["id"] for r in ROWS[::-2]}
    assert [i for i in second["train"] if i < 300] == sorted((i for i in second["train"] if i < 300), reverse=True)
    foveate.data.split(source, tmp_path / "c", shares=shares, workers=1, seed=1)
    assert set(sides(tmp_path / "c", "test")["test"]) != set(first["test"])


def test_groups_and_classes(tmp_path):
    rows = [{"id": i, "book": i // 4, "kind": "verse" if i < 40 else "prose", "text": f"text {i}"} for i in range(400)]
    source = toys.write(tmp_path / "in.jsonl", rows)
    foveate.data.split(source, tmp_path / "a", shares={"train": 3, "test": 1}, group="book", stratify="kind", workers=1)
    found = sides(tmp_path / "a", "train", "test")
    assert not {i // 4 for i in found["train"]} & {i // 4 for i in found["test"]}
    # of 10 groups of verse 2.5, to the nearest even number, and of 90 of prose 22.5
    assert Counter(rows[i]["kind"] for i in found["test"]) == {"verse": 8, "prose": 88}
    with pytest.raises(ValueError, match="row 1 of .*: there is no 'author' to group by; the fields are 'id', 'book'"):
        foveate.data.split(source, tmp_path / "b", group="author", workers=1)
    with pytest.raises(ValueError, match="row 1 of .*: there is no 'author' to stratify by"):
        foveate.data.split(source, tmp_path / "c", stratify="author", workers=1)
    with pytest.raises(ValueError, match="must be names of files, each with a share above 0"):
        foveate.data.split(source, tmp_path / "d", shares={"train": 1, "test": 0})


# ---- mix ---------------------------------------------------------------------------------------------------------------------


def test_shares_repeats_and_temperature(tmp_path):
    counts = {"a": 1000, "b": 100}
    for name, count in counts.items():
        toys.write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(count)])
    a, b = (str(tmp_path / f"{name}.jsonl") for name in counts)
    found = foveate.data.mix({a: 0.5, b: 0.5}, tmp_path / "m.jsonl", max_repeats=4, source_field="from")
    assert found["sources"][b]["drawn"] == 400 and 340 < found["sources"][a]["drawn"] < 460  # until b is used up
    rows = toys.read(tmp_path / "m.jsonl")
    assert Counter(row["text"] for row in rows if row["from"] == b) == {f"b{i}": 4 for i in range(100)}
    assert [row["text"] for row in rows if row["from"] == a] == [f"a{i}" for i in range(found["sources"][a]["drawn"])]
    half = sum(row["from"] == b for row in rows[: len(rows) // 2])
    assert half == pytest.approx(200, abs=60)  # interleaved, not one after the other
    found = foveate.data.mix([a, b], tmp_path / "n.jsonl", temperature=2.0)
    assert found["sources"][b]["weight"] == pytest.approx(100**0.5 / (100**0.5 + 1000**0.5), abs=1e-6)
    assert found["sources"][b]["drawn"] == 100
    found = foveate.data.mix([a, b], tmp_path / "o.jsonl", total=1100)
    assert found["sources"][a]["drawn"] == 1000 and found["sources"][b]["drawn"] == 100  # b goes on when a is used up
    with pytest.raises(
        ValueError, match=r"total=1,101 documents are wanted, and the sources have 1,100 with max_repeats=1"
    ):
        foveate.data.mix([a, b], tmp_path / "p.jsonl", total=1101)
    with pytest.raises(ValueError, match="must be 0 or more"):
        foveate.data.mix({a: -1}, tmp_path / "p.jsonl")


def test_interleaving_begins_anywhere(tmp_path):
    for name, count in (("a", 50), ("b", 7)):
        toys.write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(count)])
    sources = [Corpus(tmp_path / f"{name}.jsonl") for name in "ab"]
    mixture = Mixture([50, 7], [0.7, 0.3], seed=3, max_repeats=5, total=None)
    whole = [(i, row["text"]) for i, row in interleave(sources, mixture)]
    assert len(whole) == mixture.total
    for start in (1, 13, len(whole) - 1, len(whole)):
        assert [(i, row["text"]) for i, row in interleave(sources, mixture, start)] == whole[start:]


# ---- stats -------------------------------------------------------------------------------------------------------------------


def test_stats(tmp_path, monkeypatch):
    rows = [*ROWS, ROWS[3], {"text": "été\nzwei"}, {"text": " "}, {"id": None, "text": "one two", "more": 1}]
    source = toys.write(tmp_path / "in.jsonl.gz", rows)
    texts = [row["text"] for row in rows]
    for workers in (1, 2):
        found = foveate.data.stats(source, workers=workers)
        assert found["documents"] == len(rows) and found["duplicates"] == 1 and found["empty"] == 1
        assert found["bytes"] == sum(len(text.encode()) for text in texts) and found["characters"] == sum(
            map(len, texts)
        )
        assert found["words"] == sum(len(text.split()) for text in texts) and found["ascii"] == len(rows) - 1
        assert found["lines"] == sum(text.count("\n") + 1 for text in texts)
        assert found["fields"] == {"text": len(rows), "id": 301, "more": 1}
        lengths = sorted(map(len, texts))
        assert found["lengths"]["50%"] == pytest.approx(lengths[(len(rows) - 1) // 2], rel=0.02)
        assert found["lengths"]["0%"] == 1 and found["lengths"]["100%"] == pytest.approx(lengths[-1], rel=0.02)
    bad = toys.write(tmp_path / "bad.jsonl", [ROWS[0], {"body": "x"}])
    with pytest.raises(ValueError, match="row 2 of .*: there is no text in 'text'"):
        foveate.data.stats(bad, workers=1)
    assert foveate.data.stats(bad, workers=1, bad_rows="remove")["rows without text"] == 1


def test_pieces_paragraphs_and_lines_of_text(tmp_path):
    rng = random.Random(0)
    text = "\n".join(toys.sentence(rng) + ("\n" if i % 5 == 4 else "") for i in range(3000))
    file = tmp_path / "in.txt"
    file.write_text(text)
    counts = {name: foveate.data.stats(file, documents=name, workers=1)["documents"] for name in corpus.DOCUMENTS}
    assert counts == {"pieces": -(-len(text) // 66_000), "paragraphs": 600, "lines": 3000}
    found = foveate.data.clean(file, tmp_path / "o.txt", unicode=False, rules=[], whitespace=False, workers=1)
    assert (tmp_path / "o.txt").read_text().rstrip("\n") == text.rstrip("\n") and found["documents"] == counts["pieces"]
    foveate.data.clean(file, tmp_path / "l.txt", documents="lines", unicode=False, rules=[], workers=1)
    assert (tmp_path / "l.txt").read_text() == "".join(line + "\n" for line in text.split("\n") if line)
