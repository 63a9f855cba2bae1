"""The soak of benchmarks/soak.py in short: 12 seconds, or FOVEATE_SOAK_SECONDS."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


def test_nothing_is_lost(folder):
    spec = importlib.util.spec_from_file_location("serve_soak", SOAK)
    soak = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    seconds = float(os.environ.get("FOVEATE_SOAK_SECONDS", "12"))
    found = soak.soak(str(folder), seconds, 8, 0, ["--num-pages", "64", "--threads", "1"])
    assert found["problems"] == []
    assert found["prompts_seen"] > 0 and found["prompts_left"] > 0 and found["ended"]["abort"] > 0
