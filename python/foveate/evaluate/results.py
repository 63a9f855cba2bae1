"""The results of one model, and of two beside each other: as JSON, Markdown and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import foveate
from foveate.evaluate.measured import Measured
from foveate.evaluate.statistics import Difference, paired


@dataclass
class Results:
    """model: its path. tasks: what was measured. settings: what it was loaded and run with. harness: results of lm-evaluation-harness."""

    model: str
    tasks: list[Measured]
    settings: dict[str, Any] = field(default_factory=dict)
    harness: dict[str, Any] = field(default_factory=dict)
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        tasks = [
            {
                "name": task.name, "kind": task.kind, "main": task.main, "note": task.note,
                "metrics": {name: figure.to_dict() for name, figure in task.figures(self.confidence).items()},
                "examples": task.examples,
            } for task in self.tasks
        ]  # fmt: skip
        found = {
            "model": self.model, "foveate": foveate.__version__, "confidence": self.confidence, "settings": self.settings, "tasks": tasks,
        }  # fmt: skip
        return found | ({"harness": self.harness} if self.harness else {})

    def lines(self) -> list[list[str]]:
        """A row for each figure: task, kind, metric, value, interval, items."""
        rows = [["task", "kind", "metric", "value", f"{100 * self.confidence:g} % interval", "n"]]
        for task in self.tasks:
            for name, one in task.figures(self.confidence).items():
                interval = f"{one.low:.4f} - {one.high:.4f}" if math.isfinite(one.low) else ""
                rows.append([task.name, task.kind, name, f"{one.value:.4f}", interval, str(one.n)])
        for task_name, values in self.harness.get("results", {}).items():
            for name, value in values.items():
                if isinstance(value, (int, float)) and "_stderr" not in name and not isinstance(value, bool):
                    error = values.get(name.replace(",", "_stderr,", 1))
                    shown = f"± {1.96 * error:.4f}" if isinstance(error, (int, float)) else ""
                    count = self.harness.get("n", {}).get(task_name, {}).get("effective", "")
                    rows.append([task_name, "harness", name.removesuffix(",none"), f"{value:.4f}", shown, str(count)])
        return rows

    def to_markdown(self) -> str:
        head, *rows = self.lines()
        return f"# Evaluation of {self.model}\n\n{_markdown(head, rows)}" + _notes(self.tasks)

    def to_png(self, file: str | Path) -> None:
        """The main metric of each task with its interval. ImportError without matplotlib."""
        draw([self], file)


@dataclass
class Compared:
    """Two models on the same items; differences are second less first, of each task's main metric."""

    first: Results
    second: Results
    differences: list[tuple[Measured, Difference, str]]

    @property
    def worse(self) -> list[str]:
        """Tasks on which the second model is worse, by an interval that does not reach 0."""
        found = []
        for task, difference, better in self.differences:
            worse = difference.high < 0 if better == "higher" else difference.low > 0 if better == "lower" else False
            found += [task.name] if worse else []
        return found

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {
                "task": task.name, "metric": task.main, "better": better, "difference": one.value, "low": one.low, "high": one.high,
                "p": one.p, "n": one.n, "worse": task.name in self.worse,
            } for task, one, better in self.differences
        ]  # fmt: skip
        return {
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "differences": rows,
            "worse": self.worse,
        }

    def lines(self) -> list[list[str]]:
        rows = [["task", "metric", "first", "second", "difference", "interval", "p", "n", ""]]
        for task, one, better in self.differences:
            figures = [
                next(t for t in results.tasks if t.name == task.name).figures(results.confidence)[task.main].value
                for results in (self.first, self.second)
            ]
            said = (
                "worse"
                if task.name in self.worse
                else "better"
                if one.significant and better
                else "no difference shown"
            )
            rows.append([
                task.name, task.main, *(f"{value:.4f}" for value in figures), f"{one.value:+.4f}", f"{one.low:+.4f} - {one.high:+.4f}",
                f"{one.p:.3f}", str(one.n), said,
            ])  # fmt: skip
        return rows

    def to_markdown(self) -> str:
        head, *rows = self.lines()
        return f"# {self.second.model} against {self.first.model}\n\n{_markdown(head, rows)}"

    def to_png(self, file: str | Path) -> None:
        draw([self.first, self.second], file)


def compare(first: Results, second: Results) -> Compared:
    """By the paired bootstrap, of the tasks that both have. ValueError where the items are not the same number, or no task is shared."""
    others = {task.name: task for task in second.tasks}
    differences = []
    for task in first.tasks:
        if task.name in others:
            a, b = task.metrics[task.main], others[task.name].metrics[task.main]
            one = paired(np.asarray(a.rows), np.asarray(b.rows), a.aggregate, confidence=first.confidence)
            differences.append((task, one, a.better))
    if not differences:
        raise ValueError(f"{first.model} and {second.model} have no task in common that can be compared item by item")
    return Compared(first, second, differences)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def _notes(tasks: Sequence[Measured]) -> str:
    noted = [f"- {task.name}: {task.note}" for task in tasks if task.note]
    return "\n" + "\n".join(noted) + "\n" if noted else ""


def draw(results: Sequence[Results], file: str | Path) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('a picture needs matplotlib: pip install "foveate[eval]"') from error
    names = [f"{task.name}\n{task.main}" for task in results[0].tasks]
    figure = Figure(figsize=(8, 1.2 + 0.7 * max(1, len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, one in enumerate(results):
        shown = [task.figures(one.confidence)[task.main] for task in one.tasks]
        places = np.arange(len(shown)) + 0.2 * (number - (len(results) - 1) / 2)
        values = np.array([f.value for f in shown])
        errors = np.array([[max(0.0, f.value - f.low), max(0.0, f.high - f.value)] for f in shown]).T.reshape(2, -1)
        axes.errorbar(values, places, xerr=np.nan_to_num(errors), fmt="o", capsize=4, label=one.model)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    try:
        figure.savefig(str(file))
    except (ValueError, OSError) as error:
        raise ValueError(f"the picture {file} cannot be written: {error}") from error
