"""`torchrun --max-restarts`: a process that is killed mid-run is started again with the others, and the run ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_toys
from foveate.train import TrainConfig, fit
from ranks import needs_fsdp, needs_gloo, run_ranks
from train_toys import GPT2

pytestmark = [needs_gloo, needs_fsdp]

_STEPS, _SAVED, _KILLED = 50, 10, 13


def options(folder: Path, name: str) -> dict:
    """With dropout, so that the random state counts."""
    return train_toys.options(
        folder, new_model=GPT2, batch_size=2, dropout=0.2, max_steps=_STEPS, save_every=_SAVED, output_dir=str(folder / name),
    )  # fmt: skip


def rank_fit(rank: int, options: dict) -> None:
    from foveate.train.distributed.torchrun import FullyShard

    fit(TrainConfig(**options), strategy=FullyShard(torch.device("cpu")))


def lines(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def flags(options: dict) -> list[str]:
    """Of `foveate train`."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = (
                value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
            )
            found += [f"--{flag}", *values]
    return found


def torchrun(folder: Path, options: dict) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        "--monitor-interval=0.1", "-m", "foveate", "train", *flags(options),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's processes in /proc")
def test_a_killed_process_changes_nothing(tmp_path):
    from safetensors.torch import load_file

    run_ranks(rank_fit, 2, tmp_path / "ranks", options(tmp_path, "calm"))
    folder = tmp_path / "killed"
    agent = torchrun(tmp_path, options(tmp_path, "killed") | {"strategy": "fsdp", "resume": True})
    try:
        deadline = time.monotonic() + 180
        while len(lines(folder)) < _KILLED and agent.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        os.kill(min(map(int, workers)), signal.SIGKILL)
        assert _KILLED <= len(lines(folder)) < _STEPS, "the kill came too early or too late to be in the middle"
        agent.wait(timeout=180)
    finally:
        if agent.poll() is None:
            agent.terminate()  # it ends its processes
            agent.wait(timeout=40)
    log = (tmp_path / "log").read_text()
    assert agent.returncode == 0 and "exitcode: -9" in log, log
    wanted, weights = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("calm", "killed"))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    rows, wanted_rows = ([json.loads(line) for line in lines(tmp_path / name)] for name in ("killed", "calm"))
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in wanted_rows]
    assert len(rows) == _STEPS
    assert log.count(f"{_STEPS} steps, ") == 1, "one process speaks for all"
