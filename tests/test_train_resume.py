"""A run that was killed goes on bit for bit; checkpoints are whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveate.models import load_model
from foveate.train.checkpoints import Checkpoints
from foveate.train.strategy import Strategy
from train_toys import GPT2, LLAMA, largest_difference, losses, options, run
from train_toys import one_thread as one_thread

STEPS = 16
# Dropout, several passes over the data, accumulation, and a schedule in its middle: all that could be lost.
SETTINGS = {
    "new_model": GPT2, "dropout": 0.2, "max_steps": STEPS, "accumulation": 2, "save_every": 4, "eval_fraction": 0.2,
    "eval_every": 5, "lora_dropout": 0.0, "seed": 5, "batch_size": 3,
}  # fmt: skip
_CHILD = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from foveate.train import fit, loop, state_files
settings, moment = json.loads(sys.argv[1]), sys.argv[2]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "step":
    step = loop.Loop._step
    loop.Loop._step = lambda self, i: die() if i == 10 else step(self, i)
else:
    save = state_files.save
    def half(folder, *args):
        save(folder, *args)
        if folder.parent.name.startswith("step-00000012"):
            file = folder / "state.safetensors"
            file.write_bytes(file.read_bytes()[:1000])
            die()
    state_files.save = half
fit(**settings)
"""


def killed(folder: Path, moment: str, **changes: object) -> dict:
    settings = options(folder, **SETTINGS | changes)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(settings), moment],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    return settings


@pytest.mark.parametrize("moment, last", [("step", 10), ("writing", 10)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, moment, last):
    whole = run(tmp_path / "whole", **SETTINGS)
    killed(tmp_path / "killed", moment)
    out = tmp_path / "killed" / "out"
    assert (out / "last").resolve().name == f"step-{last:08d}"
    load_model(out / "last")  # what is there is whole
    continued = run(tmp_path / "killed", **SETTINGS, resume=True)
    assert continued.steps == STEPS and continued.tokens == whole.tokens
    assert largest_difference(whole, continued) == 0
    assert losses(continued) == losses(whole) and losses(continued, "eval_loss") == losses(whole, "eval_loss")
    assert [row["step"] for row in continued.history] == [row["step"] for row in whole.history]
    assert not list(out.glob("*.tmp"))
    first, second = (
        {name: tensor for name, tensor in read_state(r.last).items() if not name.startswith("random")}
        for r in (whole, continued)
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "state" / "state.safetensors")


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert run(tmp_path, max_steps=2, resume=True).steps == 2


def test_resume_after_the_end_does_nothing(tmp_path):
    first = run(tmp_path, max_steps=3)
    again = run(tmp_path, max_steps=3, resume=True)
    assert again.steps == 3 and largest_difference(first, again) == 0 and again.history == first.history


def test_resume_with_other_data_or_another_model(tmp_path):
    run(tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="other data or another batch size.*start in a new output folder"):
        run(tmp_path, max_steps=3, batch_size=5, resume=True)
    with pytest.raises(ValueError, match="has .* of shape .*, the model of .*start in a new output folder"):
        run(tmp_path, max_steps=3, new_model=LLAMA | {"hidden_size": 16}, resume=True)
    with pytest.raises(ValueError, match="state of another model.*start in a new output folder"):
        run(tmp_path, max_steps=3, new_model=LLAMA | {"num_hidden_layers": 1}, resume=True)


def test_the_best_keeps_no_state_and_links_are_relative(tmp_path):
    checkpoints = Checkpoints(tmp_path / "out", Strategy())
    checkpoints.prepare()
    for step, best in ((1, True), (2, False), (3, False)):
        checkpoints.save(step, lambda folder: (folder / "model").write_text("x") and None, best=best)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["best", "last", "step-00000001", "step-00000003"]
    assert not (tmp_path / "out" / "best" / "state").exists() and (tmp_path / "out" / "last" / "state").exists()
    (tmp_path / "out").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "last").resolve().name == "step-00000003"


def test_an_output_folder_by_a_relative_path_or_a_link(tmp_path, monkeypatch):
    """Checkpoints are told apart by their names, however the folder is reached."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "link/out"):
        result = run(tmp_path, output_dir=folder, max_steps=3, save_every=1, eval_fraction=0.2)
        assert result.last.is_absolute() and load_model(result.last) and load_model(result.best)
        assert run(tmp_path, output_dir=folder, max_steps=3, eval_fraction=0.2, resume=True).steps == 3


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path / "out", Strategy())
    checkpoints.prepare()
    checkpoints.save(1, lambda folder: (folder / "model").write_text("x") and None, best=False)

    def full(folder: Path) -> None:
        (folder / "model").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        OSError, match=r"the disk of .* is full.*step-00000001 is still there: make room and go on with resume"
    ):
        checkpoints.save(2, full, best=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["last", "step-00000001"]
