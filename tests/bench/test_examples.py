"""Each example runs on a toy model and prints what it promises, in fewer than 40 lines."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import generation_toys as toys

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(toys.folder(tmp_path_factory.mktemp("toy"), positions=2048))


@pytest.mark.parametrize(
    "name, options, lines",
    [
        ("content_writing", [], ["--- draft 1 (", "--- draft 3 (", "ended by length)"]),
        ("code_completion", [], ["def fahrenheit_to_celsius(fahrenheit):", "guessed tokens were right"]),
        ("customer_service_chat", ["--message", "help"], ["> help", "{'topic': '", "'urgent': "]),
        (
            "answer_over_text",
            ["--question", "a?", "--question", "b?"],
            ["(0 of ", "prompt tokens were in the cache)", "b?"],
        ),
        ("dialogue", ["--turns", "2"], ["Ben: Hello Ada.", "\nAda: ", "\nBen: "]),
    ],
)
def test_an_example_runs(name, options, lines, model, capsys):
    if name == "customer_service_chat":
        pytest.importorskip("llguidance")
    importlib.import_module(name).main(["--model", model, "--max-tokens", "5", *options])
    out = capsys.readouterr().out
    for line in lines:
        assert line in out


@pytest.mark.parametrize(
    "name", ["content_writing", "code_completion", "customer_service_chat", "answer_over_text", "dialogue"]
)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 40
