"""The examples of training run on a little data and print what they promise."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from model_cases import needs_minilm
from train_toys import sentences

pytestmark = pytest.mark.usefixtures("one_thread")

PLAY = "\n\n".join(
    f"{name}:\n{text}." for name, text in zip(["ROMEO", "JULIET", "First Citizen"] * 40, sentences(120, longest=16))
)


@pytest.fixture(autouse=True)
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def call(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    importlib.import_module(name).main()


@pytest.fixture
def play(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "play.txt").write_text(PLAY)
    return tmp_path / "play.txt"


def test_shakespeare(play, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "train_shakespeare", play, "--output-dir", tmp_path / "out", "--steps", 2)
    out = capsys.readouterr().out
    assert "nats a character" in out and "---\nROMEO:\n" in out and "---\nFirst Citizen:\n" in out
    assert (tmp_path / "out" / "train.txt").read_text() + (tmp_path / "out" / "held_out.txt").read_text() == PLAY


@needs_minilm
def test_masked_lm(play, tmp_path, monkeypatch, capsys):
    play.write_text(PLAY * 12)  # two documents
    call(monkeypatch, "train_masked_lm", play, "--output-dir", tmp_path / "out", "--steps", 1)
    assert set(json.loads(capsys.readouterr().out)) == {"loss", "perplexity", "accuracy"}


@needs_minilm
def test_squad(play, tmp_path, monkeypatch, capsys):
    context = "The trial was held in Leeds."
    answer = {"text": "Leeds", "answer_start": context.index("Leeds")}
    paragraph = {"context": context, "qas": [{"id": "1", "question": "Where was the trial?", "answers": [answer]}]}
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"data": [{"paragraphs": [paragraph] * 4}]}))
    call(monkeypatch, "train_squad", file, file, "--output-dir", tmp_path / "out", "--epochs", 1)
    out = capsys.readouterr().out
    assert {"exact_match", "f1", "loss"} == set(
        json.loads(out.splitlines()[0])
    ) and "Who led the first part? {'score'" in out


def test_conversations():
    from train_instructions import conversations

    found = conversations(
        "ROMEO:\nWhat light through yonder window?\n\nJULIET:\nO Romeo, wherefore art thou?\n\nAll:\nOh!"
    )
    assert [m["content"] for m in found[0]["messages"]] == [
        "You are Juliet in a play by Shakespeare. Reply in character.",
        "What light through yonder window?",
        "O Romeo, wherefore art thou?",
    ]
    assert len(found) == 1


def test_instruct_gpt(tmp_path, monkeypatch, capsys):
    """The three steps, the second and third on what the ones before have left."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    call(monkeypatch, "instruct_gpt", "--tiny", "--output-dir", tmp_path / "out", "--steps", 3, 3, 2)
    out = capsys.readouterr().out
    assert "of the held-out pairs are ranked" in out and "before: reward" in out and "after: reward" in out
    settings = json.loads((tmp_path / "out/2_reward/last/config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"]
    rows = [json.loads(line) for line in (tmp_path / "out/3_policy/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["kl"] == 0 and rows[1]["kl"] != 0
