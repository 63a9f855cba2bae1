"""Classes of a classifier: what a label may be, their order, class weights, several labels a row, other classes than the checkpoint's."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foveate.train.objectives.classification import truncated
from foveate.train.objectives.labels import class_weights, find_classes
from objective_toys import BERT, wordpiece
from train_toys import losses, run, sentences, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSIFY = {"objective": "sequence-classification", "new_model": BERT, "max_steps": 2}


def rows(labels: list, count: int = 24) -> list[dict]:
    return [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(sentences(count))]


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, "", "  ", {"a": 1}])
def test_a_missing_label_is_an_error_with_its_row(tmp_path, missing):
    data = rows(["a", "b"])
    data[5]["label"] = missing
    with pytest.raises(ValueError, match="row 6 of"):
        run(tmp_path, **CLASSIFY, tokenizer=wordpiece(tmp_path), train_data=[write_jsonl(tmp_path / "a.jsonl", data)])


@pytest.mark.parametrize(
    "labels, names",
    [
        ([10, 2, 0], ["0", "2", "10"]), ([1.0, 0.0], ["0", "1"]), (["²", "³"], ["²", "³"]), (["--1", "--2"], ["--1", "--2"]),
        (["1.5", "10.5", "9"], ["1.5", "9", "10.5"]), (["nan", "1"], ["1", "nan"]), (["b", "a"], ["a", "b"]),
        ([True, False], ["False", "True"]),
    ],
)  # fmt: skip
def test_the_order_of_classes(labels, names):
    assert find_classes(rows(labels), "label", []).names == names


def test_the_order_of_equal_numbers_does_not_follow_that_of_the_rows():
    names = ["1", "01", "1.0", "001", "2"]
    found = {tuple(find_classes(rows(names[i:] + names[:i]), "label", []).names) for i in range(5)}
    assert found == {("001", "01", "1", "1.0", "2")}


def test_a_checkpoints_classes():
    known = ["bad", "fair", "good"]
    same = find_classes(rows(["good", "bad"]), "label", known)
    assert same.names == known and same.known and same.counts == [12, 0, 12]
    numbered = find_classes(rows([2, 0, 1]), "label", known)
    assert numbered.names == known and numbered.known and [numbered.number(x) for x in "012"] == [0, 1, 2]
    other = find_classes(rows(["spam", "ham"]), "label", known)
    assert other.names == ["ham", "spam"] and not other.known
    for classes, label in ((numbered, "3"), (numbered, "good"), (other, "good")):
        with pytest.raises(ValueError, match="is not one of the training data's"):
            classes.number(label)


def test_a_classifier_learns_other_classes(tmp_path):
    """With a new classifier; the same classes go on with the old one."""
    tokenizer = wordpiece(tmp_path)
    first = run(
        tmp_path / "a",
        **CLASSIFY,
        tokenizer=tokenizer,
        train_data=[write_jsonl(tmp_path / "a.jsonl", rows(["a", "b", "c"]))],
    )
    more = {
        **CLASSIFY,
        "new_model": None,
        "tokenizer": None,
        "model": str(first.last),
        "max_steps": 1,
        "learning_rate": 1e-9,
    }
    same = run(tmp_path / "b", **more, train_data=[write_jsonl(tmp_path / "b.jsonl", rows(["c", "a"]))])
    assert torch.allclose(same.model.classifier.weight, first.model.classifier.weight, atol=1e-6)
    for labels in (["spam", "ham", "eggs"], list("abcd")):
        out = run(tmp_path / "-".join(labels), **more, train_data=[write_jsonl(tmp_path / "c.jsonl", rows(labels))])
        config = json.loads((out.last / "config.json").read_text())
        assert list(config["id2label"].values()) == sorted(labels)
        assert out.model.classifier.weight.shape[0] == len(labels)
        assert not torch.equal(out.model.classifier.weight[:3], first.model.classifier.weight)


def test_class_weights_are_torchs(tmp_path, monkeypatch):
    """A step's loss is the mean weighted by each row's class, also over accumulated batches."""
    classes = find_classes(rows(["a", "a", "a", "b"]), "label", [])
    assert class_weights(["balanced"], classes).tolist() == pytest.approx([24 / (2 * 18), 24 / (2 * 6)])
    assert class_weights(["b=3"], classes).tolist() == [1, 3] and class_weights([], classes) is None
    for given in (["c=1"], ["b=0"], ["b=x"], ["b"]):
        with pytest.raises(ValueError, match="is not CLASS=X"):
            class_weights(given, classes)
    data = write_jsonl(tmp_path / "a.jsonl", rows(["a", "a", "b", "a", "b", "a", "a"], 12))
    common = {
        **CLASSIFY,
        "tokenizer": wordpiece(tmp_path),
        "train_data": [data],
        "max_steps": 1,
        "class_weights": ["b=3"],
        "packing": False,
    }
    whole = run(tmp_path / "w", **common, batch_size=12)
    parts = run(tmp_path / "p", **common, batch_size=3, accumulation=4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    kept = []
    from foveate.train.objectives.classification import Classification

    plain = Classification._logits
    monkeypatch.setattr(
        Classification, "_logits", lambda self, m, b: kept.append((plain(self, m, b), b["labels"])) or kept[-1][0]
    )
    again = run(tmp_path / "x", **common, batch_size=12)
    logits, labels = kept[0]
    expected = F.cross_entropy(logits.detach(), labels, torch.tensor([1.0, 3.0]))
    assert losses(again) == pytest.approx([float(expected)], rel=1e-5)


def test_several_labels_a_row(tmp_path):
    """transformers' multi_label_classification: its loss, and its model reads ours."""
    transformers = pytest.importorskip("transformers")
    data = [
        {"text": text, "label": [name for name in ("fox", "rain", "dog") if name in text]}
        for text in sentences(120, longest=12)
    ]
    result = run(
        tmp_path, **CLASSIFY | {"max_steps": 12}, tokenizer=wordpiece(tmp_path), eval_fraction=0.2, learning_rate=5e-3,
        train_data=[write_jsonl(tmp_path / "a.jsonl", data)], best_by="f1",
    )  # fmt: skip
    assert losses(result)[-1] < losses(result)[0] and 0 <= result.metrics["f1"] <= 1
    theirs = transformers.BertForSequenceClassification.from_pretrained(result.last).eval()
    assert theirs.config.problem_type == "multi_label_classification"
    tokens, labels = torch.tensor([[2, 8, 9, 10, 3]]), torch.tensor([[1.0, 0.0, 1.0]])
    out = theirs(tokens, labels=labels)
    from foveate.train.objectives.classification import _yes_or_no

    assert torch.allclose(_yes_or_no(result.model(tokens), labels.long()), out.loss, atol=1e-5)
    mixed = write_jsonl(tmp_path / "m" / "m.jsonl", [data[0], {"text": "a", "label": "fox"}] * 3)
    with pytest.raises(ValueError, match="row 2 of .*other rows have lists of labels"):
        run(tmp_path / "m", **CLASSIFY, tokenizer=wordpiece(tmp_path / "m"), train_data=[mixed])


@pytest.mark.parametrize("first, second", [(3, 0), (9, 0), (4, 9), (9, 4), (7, 7), (2, 12)])
@pytest.mark.parametrize("longest", [6, 8, 11])
def test_truncation_is_that_of_the_tokenizers_library(tmp_path, first, second, longest):
    """longest_first, from the end of each text."""
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer.from_file(str(Path(wordpiece(tmp_path)) / "tokenizer.json"))
    words = ["fox", "dog", "rain", "old", "the", "lazy", "runs", "quick"] * 2
    texts = [" ".join(words[:first]), " ".join(words[1 : 1 + second])]
    whole = backend.encode(*texts[: 2 if second else 1])
    backend.enable_truncation(longest)
    expected = backend.encode(*texts[: 2 if second else 1])
    tokens, types = truncated(np.array(whole.ids), np.array(whole.type_ids), longest)
    assert len(tokens) == min(longest, len(whole.ids)) == len(expected.ids)
    assert tokens[[0, -1]].tolist() == [expected.ids[0], expected.ids[-1]]
    assert (
        abs(int((types == 1).sum()) - sum(expected.type_ids)) <= 1
    )  # which text gives the last one is the library's choice


def test_long_texts_are_cut_or_left_out_and_it_is_said(tmp_path, capfd):
    data = rows(["a", "b"], 10) + [{"text": "fox " * 80, "label": "a"}] * 3
    common = {
        **CLASSIFY,
        "tokenizer": wordpiece(tmp_path),
        "train_data": [write_jsonl(tmp_path / "a.jsonl", data)],
        "progress": None,
    }
    run(tmp_path / "t", **common, too_long="truncate")
    assert "3 of 13 texts are longer than max_length=64 tokens" in capfd.readouterr().err
    run(tmp_path / "d", **common, too_long="drop")
    assert "are left out" in capfd.readouterr().err
    with pytest.raises(ValueError, match="cut them with too_long='truncate'"):
        run(tmp_path / "e", **common)
