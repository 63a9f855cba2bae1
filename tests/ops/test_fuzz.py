"""The fuzzers of fuzz.py in child processes: FOVEATE_FUZZ_CASES of each kind (500; `make fuzz` has 20,000), from FOVEATE_FUZZ_FIRST on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fuzz

KINDS = tuple(fuzz.KINDS)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_damage_ends_in_success_or_a_sentence(kind):
    cases, first = int(os.environ.get("FOVEATE_FUZZ_CASES", "500")), int(os.environ.get("FOVEATE_FUZZ_FIRST", "0"))
    program = Path(fuzz.__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(program), kind, str(first), str(cases)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = found.stdout.splitlines()
    wrong = [line for line in lines if line.startswith("WRONG")]
    last = lines[-1] if lines else "nothing"
    assert found.returncode == 0, f"exit status {found.returncode} after: {last}\n" + "\n".join(wrong[:20])
    assert sum(line.startswith("case") for line in lines) == cases
