"""Report: metrics.jsonl, the bar, TensorBoard, and the picture of the loss."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from foveate.progress import ProgressBar
from foveate.train.curve import draw_curve, new_figure

METRICS, PICTURE = "metrics.jsonl", "loss.png"


class Report:
    """One process writes; on the others `active` is False and nothing happens.

    metrics.jsonl has a line for every `log_every` steps and the last one, {"step", "loss", "learning_rate", "grad_norm",
    "tokens_per_second", "memory_mib", "epoch"}, means since the last line, and one for each evaluation, {"step", "eval_loss", ...}; null
    for what is no finite number.
    progress: True shows a bar, None one in a terminal and the lines elsewhere, both on stderr; False shows nothing.
    """

    def __init__(self, folder: Path, *, log_every: int, progress: bool | None, tensorboard: bool, active: bool) -> None:
        self.folder, self.log_every, self.active = folder, log_every, active
        self.history: list[dict[str, float]] = []
        self._sums: dict[str, float] = {}  # of the steps since the last line
        self._reached: dict[str, float] = {}
        self._last = 0
        self._bar: ProgressBar | None = None
        self._talks = progress is not False
        self._shown = active and (sys.stderr.isatty() if progress is None else progress)
        self._writer = _tensorboard(folder / "tensorboard") if tensorboard and active else None
        self._evaluated: dict[str, float] = {}
        new_figure(1, 1)  # a library that is missing is missed now, not after an hour

    def begin(self) -> None:
        """A new run: forgets the lines of an earlier one."""
        if self.active:
            (self.folder / METRICS).write_text("")

    def forget_after(self, step: int) -> None:
        """A run that goes on from `step` writes the lines after it again."""
        if not self.active:
            return
        file = self.folder / METRICS
        lines = file.read_text().splitlines() if file.exists() else []
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # half a line, from a run that was killed
                continue
            if row["step"] <= step:
                rows.append({name: math.nan if value is None else value for name, value in row.items()})
        self.history = rows
        file.write_text("".join(json.dumps(finite(row), allow_nan=False) + "\n" for row in rows))

    @property
    def shows_bars(self) -> bool:
        return self._shown

    def start(self, step: int, steps: int) -> None:
        self._last = steps
        if not self._shown:
            return
        self._bar = ProgressBar("training", "bar", "count", "remaining", "note", total=steps, completed=step)
        self._bar.start()

    def step(self, step: int, *, tokens: int, seconds: float, epoch: float, **values: float) -> None:
        """values are averaged over the steps of a line."""
        if not self.active:
            return
        for name, value in {**values, "tokens": tokens, "seconds": seconds, "steps": 1}.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._reached = {"step": step, "epoch": round(epoch, 4)}
        if self._bar is not None:
            evaluated = "".join(f"  {name} {value:.4g}" for name, value in self._evaluated.items())
            speed = self._sums["tokens"] / self._sums["seconds"]
            note = f"loss {values['loss']:.4f}{evaluated}  {speed:,.0f} tokens/s  {memory_mib():,.0f} MiB"
            self._bar.reach(step, note)
        if step % self.log_every == 0 or step == self._last:
            self._line()

    def _line(self) -> None:
        """Writes the means of the steps since the last line, if there are any."""
        sums, self._sums = self._sums, {}
        if not sums:
            return
        steps, tokens, seconds = (sums.pop(name) for name in ("steps", "tokens", "seconds"))
        self._write({
            "step": self._reached["step"], **{name: value / steps for name, value in sums.items()},
            "tokens_per_second": round(tokens / seconds, 1), "memory_mib": round(memory_mib(), 1),
            "epoch": self._reached["epoch"],
        })  # fmt: skip

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._evaluated = {f"eval_{name}": value for name, value in metrics.items()}
        self._write({"step": step, **self._evaluated})
        self.draw()

    def note(self, text: str) -> None:
        """A line for the user, on stderr."""
        if self.active and self._talks:
            if self._bar is not None:
                self._bar.print(text)
            else:
                print(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._writer is not None:
            self._writer.close()
        self._line()
        self.draw()

    def draw(self) -> None:
        """loss.png"""
        if not (self.active and self.history):
            return
        try:
            draw_curve(self.history, self.folder / PICTURE)
        except (
            OSError
        ) as error:  # not raised, as it could hide the error that ends the run; the numbers are in metrics.jsonl
            self.note(f"{self.folder / PICTURE} could not be written: {error}")

    def _write(self, row: dict[str, float]) -> None:
        if not self.active:
            return
        self.history.append(row)
        try:
            with (self.folder / METRICS).open("a") as stream:
                stream.write(json.dumps(finite(row), allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.folder / METRICS} could not be written ({error.strerror}); make room and go on with resume from the last "
                "checkpoint"
            ) from error
        if self._bar is None:
            self.note("  ".join(f"{name} {value:.6g}" for name, value in row.items()))
        if self._writer is not None:
            for name, value in row.items():
                kind = "evaluation" if name.startswith("eval_") else "training"
                if name not in ("step", "epoch"):
                    self._writer.add_scalar(
                        f"{kind}/{name.removeprefix('eval_')}", value, int(row["step"]), time.time()
                    )


def finite(value: Any) -> Any:
    """As JSON knows it: None in place of a number that is none."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def memory_mib() -> float:
    """The most that was in use so far: of the GPU's memory, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('tensorboard is not installed: pip install "foveate[train]"') from error
    return SummaryWriter(str(folder))
