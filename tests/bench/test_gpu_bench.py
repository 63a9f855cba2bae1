"""benchmarks/gpu.py without a GPU: what it leaves out it says, and its cases run."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import foveate

pytestmark = [pytest.mark.interpreted, pytest.mark.triton]

BENCH = Path(__file__).parents[2] / "benchmarks"


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


def test_the_script_runs_the_steps_that_it_is_told(tmp_path):
    """With --rehearse: no GPU, no build, and peers that are not there."""
    pytest.importorskip("triton")
    script, environment = str(BENCH / "gpu.sh"), os.environ | {"PYTHON": sys.executable}
    command = ["bash", script, "--rehearse", "--only", "peers", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = (tmp_path / "summary.txt").read_text()
    assert "peers: passed in" in summary
    assert "exit 0 after" in summary
    assert not any(f"{name}: " in summary for name in ("build", "device", "bench", "native", "triton", "sanitizer"))
    assert "fa3: left out" in (tmp_path / "peers.txt").read_text()
    done = subprocess.run(["bash", script, "--ony", "peers", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: benchmarks/gpu.sh" in done.stdout


def test_its_rows_are_checked_timed_and_written_at_once(tmp_path, monkeypatch, capsys):
    if foveate.backends()["triton"] is not None:
        pytest.skip(f"triton: {foveate.backends()['triton']}")
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    bench = gpu.Bench(True, time.monotonic() + 100)
    monkeypatch.setattr(gpu, "works", lambda bench: (*gpu.limit_works(bench), *gpu.row_works(bench)))
    report = gpu.Report(tmp_path / "rows.csv", "none", "none")
    gpu.measure(bench, gpu.own_calls, report)
    rows = report.rows
    assert {(row["op"], row["who"]) for row in rows} >= {
        ("softmax", "foveate triton"),
        ("rms_norm", "torch"),
        ("limit", "torch"),
    }
    assert all(row["ms"] > 0 and row["rate"] > 0 for row in rows)
    shares = {(row["op"], row["of"]) for row in rows}
    assert shares == {("limit", ""), ("softmax", "copy"), ("cross_entropy", "read"), ("rms_norm", "copy")}
    with report.path.open() as file:
        written = list(csv.DictReader(file))
    assert [row["who"] for row in written] == [row["who"] for row in rows]
    assert len(written[0]["commit"]) in (7, 40)
    assert gpu.Report(report.path, "none", "none").limits == pytest.approx(report.limits)

    monkeypatch.setattr(foveate, "softmax", lambda x, **_: x * 0)
    report = gpu.Report(tmp_path / "others.csv", "none", "none", "torch")
    gpu.measure(bench, gpu.own_calls, report)
    assert {row["who"] for row in report.rows} == {"torch"}
    assert "foveate triton: Tensor-likes are not close" in capsys.readouterr().out


def test_gradients_are_checked(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import gpu

    x = torch.randn(8, requires_grad=True)
    calls = {"first": lambda: x * 2, "same": lambda: x + x, "wrong": lambda: x * 2 + (x - x.detach())}
    work = gpu.Work("backward", "case", (x,), 1.0, "TFLOP/s")
    assert gpu.checked(work, calls).keys() == {"first", "same"}
    assert "wrong: Tensor-likes are not close" in capsys.readouterr().out
