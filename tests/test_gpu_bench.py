"""bench/gpu.py without a GPU: what it leaves out it says, and its cases run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import foveate

BENCH = Path(__file__).parents[1] / "bench"


def run(tmp_path: Path, **environment: str) -> tuple[str, list[dict[str, str]]]:
    """The output of a run that has no time for any case, and its CSV file."""
    file = tmp_path / "triton.csv"
    command = [sys.executable, str(BENCH / "gpu.py"), str(file), "--dry-run", "--seconds", "0"]
    path = os.pathsep.join([str(Path(foveate.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, check=True
    )
    return done.stdout, list(csv.DictReader(file.read_text().splitlines()))


def test_what_has_no_time_is_named(tmp_path):
    pytest.importorskip("triton")
    printed, rows = run(tmp_path, FOVEATE_PEERS=str(tmp_path))
    assert rows == [] and "left out, the time is over: forward D 128 S 8192 causal" in printed
    assert f"liger: left out, there is no {tmp_path / 'liger'}" in printed
    assert "fa3: left out, FOVEATE_PEERS is not set" in run(tmp_path, FOVEATE_PEERS="")[0]


def test_its_rows_are_checked_and_timed(monkeypatch, capsys):
    if foveate.backends()["triton"] is not None:
        pytest.skip(f"triton: {foveate.backends()['triton']}")
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    bench = gpu.Bench(True, time.monotonic() + 100)
    monkeypatch.setattr(gpu, "works", gpu.row_works)
    rows = gpu.measure(bench, gpu.own_calls)
    assert {(row["op"], row["who"]) for row in rows} >= {
        ("softmax", "foveate triton"),
        ("rms_norm", "torch"),
        ("copy", "torch"),
    }
    assert all(row["ms"] > 0 and row["rate"] > 0 for row in rows)

    monkeypatch.setattr(foveate, "softmax", lambda x, **_: x * 0)
    rows = gpu.measure(bench, gpu.own_calls)
    assert ("softmax", "foveate triton") not in {(row["op"], row["who"]) for row in rows}
    assert "foveate triton: Tensor-likes are not close" in capsys.readouterr().out
