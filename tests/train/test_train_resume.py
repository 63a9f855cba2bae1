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
from foveate.train import fit
from foveate.train.checkpoints.folder import Checkpoints
from foveate.train.interrupt import Interrupted
from foveate.train.loop import Loop
from foveate.train.strategy import Strategy
from train_toys import GPT2, LLAMA, largest_difference, losses, options, run, texts

pytestmark = pytest.mark.usefixtures("one_thread")

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
from foveate.train import fit, loop
from foveate.train.checkpoints import state
settings, moment = json.loads(sys.argv[1]), sys.argv[2]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "step":
    step = loop.Loop._step
    loop.Loop._step = lambda self, i: die() if i == 10 else step(self, i)
else:
    save = state.save
    def half(folder, *args):
        save(folder, *args)
        if folder.parent.name.startswith("step-00000012"):
            file = folder / "state.safetensors"
            file.write_bytes(file.read_bytes()[:1000])
            die()
    state.save = half
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


def test_resume_after_the_end_does_nothing(tmp_path, capfd):
    first = run(tmp_path, max_steps=3)
    again = run(tmp_path, max_steps=3, resume=True, progress=None)
    assert "the run is at its end, step 3" in capfd.readouterr().err
    assert again.steps == 3 and largest_difference(first, again) == 0 and again.history == first.history


def test_resume_with_other_data_or_another_model(tmp_path):
    run(tmp_path, max_steps=3)
    with pytest.raises(
        ValueError,
        match="of a run with other data or other options: rows a step=5 .was 4..*start in a new output folder",
    ):
        run(tmp_path, max_steps=3, batch_size=5, resume=True)
    with pytest.raises(ValueError, match="has .* of shape .*, the model of .*start in a new output folder"):
        run(tmp_path, max_steps=3, new_model=LLAMA | {"hidden_size": 16}, resume=True)
    with pytest.raises(ValueError, match="state of another model.*start in a new output folder"):
        run(tmp_path, max_steps=3, new_model=LLAMA | {"num_hidden_layers": 1}, resume=True)


def test_the_best_keeps_no_state_and_links_are_relative(tmp_path):
    checkpoints = Checkpoints(tmp_path / "out", Strategy())
    with checkpoints.claimed():
        for step, best in ((1, True), (2, False), (3, False)):
            checkpoints.save(step, lambda folder: (folder / "model").write_text("x") and None, best=best)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["best", "checkpoints.json", "last", "step-00000001", "step-00000003"]
    assert not (tmp_path / "out" / "best" / "state").exists() and (tmp_path / "out" / "last" / "state").exists()
    (tmp_path / "out").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "last").resolve().name == "step-00000003"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(tmp_path, monkeypatch, capfd, number):
    whole = run(tmp_path / "whole", **SETTINGS)
    step = Loop._step
    monkeypatch.setattr(Loop, "_step", lambda self, i: (i == 6 and signal.raise_signal(number)) or step(self, i))
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=r"stopped after step 7 of 16 with the checkpoint .*step-00000007; go on with resume"
    ) as error:
        run(tmp_path / "stopped", **SETTINGS)
    assert error.value.signal == number and signal.getsignal(number) is before
    assert "once more to stop at once" in capfd.readouterr().err
    monkeypatch.undo()
    continued = run(tmp_path / "stopped", **SETTINGS, resume=True)
    assert largest_difference(whole, continued) == 0 and losses(whole) == losses(continued)


def test_a_signal_is_not_lost_in_what_the_caller_raises(tmp_path, monkeypatch):
    """A search goes on after a trial that was pruned, but not after Ctrl-C."""

    def prune(step, metrics):
        raise RuntimeError("pruned")

    step = Loop._step
    monkeypatch.setattr(Loop, "_step", lambda self, i: signal.raise_signal(signal.SIGINT) or step(self, i))
    with pytest.raises(Interrupted, match="stopped by a signal; before that: RuntimeError.*pruned"):
        fit(**options(tmp_path, eval_fraction=0.2, eval_every=1, max_steps=3), after_evaluation=prune)


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    step = Loop._step
    monkeypatch.setattr(Loop, "_step", lambda self, i: (signal.raise_signal(signal.SIGINT), step(self, i))[1])
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run(tmp_path, **SETTINGS).steps == STEPS
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_second_signal_stops_at_once(tmp_path, monkeypatch):
    step = Loop._step

    def twice(self, i):
        if i == 6:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return step(self, i)

    monkeypatch.setattr(Loop, "_step", twice)
    with pytest.raises(KeyboardInterrupt) as error:
        run(tmp_path, **SETTINGS)
    assert not isinstance(error.value, Interrupted)
    assert (tmp_path / "out" / "last").resolve().name == "step-00000005"  # as if it had been killed
    monkeypatch.undo()
    assert run(tmp_path, **SETTINGS, resume=True).steps == STEPS


def test_a_run_can_be_prolonged(tmp_path, capfd):
    """Beside more steps, the choices of the optimisation may change; the tokens, the adapters and the order of the data may not."""
    settings = {"schedule": "constant", "warmup": 0, "learning_rate": 1e-3}
    whole = run(tmp_path / "whole", **settings, max_steps=6)
    run(tmp_path / "short", **settings, max_steps=3)
    longer = run(tmp_path / "short", **settings, max_steps=6, resume=True, progress=None)
    assert longer.steps == 6 and largest_difference(whole, longer) == 0
    assert "from here on other than before: max_steps=6 (was 3)" in capfd.readouterr().err
    slower = run(tmp_path / "short", **settings | {"learning_rate": 1e-4}, max_steps=8, resume=True, progress=None)
    assert losses(slower, "learning_rate")[-2:] == [1e-4, 1e-4]
    assert "max_steps=8 (was 6), learning_rate=0.0001 (was 0.001)" in capfd.readouterr().err
    for change, sentence in {
        "seed": (5, "seed=5 .was 0."), "packing": (False, "packing=False .was True."), "max_length": (32, "max_length=32 .was None."),
        "train_data": ([texts(tmp_path, 40, seed=1, name="other.jsonl")], "checksum of their lengths="),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"of a run with other data or other options: .*{sentence[1]}"):
            run(tmp_path / "short", **settings, max_steps=9, resume=True, **{change: sentence[0]})


def test_the_last_step_has_a_line(tmp_path):
    """Also if log_every does not divide it."""
    result = run(tmp_path, max_steps=5, log_every=3)
    whole = run(tmp_path / "whole", max_steps=5, log_every=1)
    assert [row["step"] for row in result.history] == [3, 5]
    assert losses(result) == pytest.approx([sum(losses(whole)[:3]) / 3, sum(losses(whole)[3:]) / 2])
    assert (tmp_path / "out" / "loss.png").exists()


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
    with checkpoints.claimed():
        checkpoints.save(1, lambda folder: (folder / "model").write_text("x") and None, best=False)

    def full(folder: Path) -> None:
        (folder / "model").write_text("half")
        raise OSError(28, "No space left on device")

    sentence = r"the disk of .* is full.*step-00000001 is still there: make room and go on with resume"
    with checkpoints.claimed(resume=True), pytest.raises(OSError, match=sentence):
        checkpoints.save(2, full, best=False)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoints.json", "last", "step-00000001"]
