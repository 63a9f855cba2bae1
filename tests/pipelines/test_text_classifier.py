"""TextClassifier and foveate classify: what a trained classifier is used by, against transformers' pipeline."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch

import foveate
from foveate.cli import main
from objective_toys import BERT, wordpiece
from train_toys import run, sentences, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the quick brown fox", "old stones", "rain falls on a lazy dog and runs far away", "fox"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    rows = [{"text": text, "label": ["no", "yes"]["fox" in text]} for text in sentences(120)]
    return run(
        folder, objective="sequence-classification", new_model=BERT, tokenizer=wordpiece(folder), max_steps=60, learning_rate=5e-3,
        train_data=[write_jsonl(folder / "a.jsonl", rows)],
    )  # fmt: skip


def test_equals_the_pipeline(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.pipeline("text-classification", model=str(trained.last), device="cpu")
    classify = foveate.TextClassifier(str(trained.last))
    for batch_size in (1, 3, 8):
        for ours, expected in zip(classify(TEXTS, batch_size=batch_size), theirs(TEXTS)):
            assert ours["label"] == expected["label"] and ours["score"] == pytest.approx(expected["score"], abs=1e-5)
    assert [best["label"] for best in classify(TEXTS)] == ["yes", "no", "no", "yes"]
    both = classify(TEXTS[0], top_k=5)
    expected = theirs(TEXTS[0], top_k=None)
    assert [c["label"] for c in both] == [c["label"] for c in expected] and sum(
        c["score"] for c in both
    ) == pytest.approx(1)
    [pair] = theirs([{"text": TEXTS[0], "text_pair": TEXTS[1]}])
    found = classify(TEXTS[0], TEXTS[1])
    assert found["label"] == pair["label"] and found["score"] == pytest.approx(pair["score"], abs=1e-5)
    assert foveate.TextClassifier(trained.model, trained.tokenizer, ["no", "yes"])(TEXTS[3]) == classify(TEXTS[3])


def test_sentences_for_what_cannot_be_classified(trained, tmp_path):
    classify = foveate.TextClassifier(str(trained.last))
    with pytest.raises(ValueError, match="do not fit the model's 64 positions"):
        classify("fox " * 70)
    with pytest.raises(ValueError, match="2 texts and 1 second texts"):
        classify(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="top_k=0 must be 1 or more"):
        classify("a", top_k=0)
    with pytest.raises(ValueError, match="2 classes, and there are none labels"):
        foveate.TextClassifier(trained.model, trained.tokenizer)
    assert classify([]) == []
    config = json.loads((trained.last / "config.json").read_text())
    shutil.copytree(trained.last, tmp_path, dirs_exist_ok=True)
    for change, sentence in (
        ({"model_type": "gpt2"}, "classification needs 'bert' or 'roberta'"),
        ({"problem_type": "ranking"}, "problem_type 'ranking'; known are single_label_classification"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=sentence):
            foveate.TextClassifier(tmp_path)


def test_classify_prints_a_line_for_each_text(trained, tmp_path, capsys, monkeypatch):
    model = ["classify", "--model", str(trained.last)]
    assert main([*model, *(part for text in TEXTS for part in ("--text", text))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["yes", "no", "no", "yes"] and 0.5 < float(lines[0].split()[1]) <= 1
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n\n")
    assert main([*model, "--file", str(tmp_path / "a.txt")]) == 0
    assert capsys.readouterr().out.splitlines() == [*lines, ""], "a line for each line, empty for an empty one"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TEXTS)))
    assert main([*model, "--json", "--top-k", "2"]) == 0
    found = json.loads(capsys.readouterr().out)["texts"]
    assert [row["text"] for row in found] == TEXTS and len(found[0]["classes"]) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert main(model) == 2 and "there is no text; give --text or --file" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n \n")
    assert main([*model, "--file", str(tmp_path / "empty.txt")]) == 2 and "lines are empty" in capsys.readouterr().err
    assert main([*model[:2], str(tmp_path), "--text", "x"]) == 1 and "is not a model folder" in capsys.readouterr().err
    assert torch.is_grad_enabled()
