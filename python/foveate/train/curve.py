"""The picture of a run: loss of training and evaluation over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('matplotlib is not installed: pip install "foveate[train]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def draw_curve(history: list[dict[str, float]], file: Path) -> None:
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            axes.plot(*zip(*points), label=label, linewidth=1.2, marker="." if len(points) < 40 else None)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)
