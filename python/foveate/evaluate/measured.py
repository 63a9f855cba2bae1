"""What a task gives: a row for each item, from which figures, intervals and paired differences are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from foveate.evaluate import statistics
from foveate.evaluate.statistics import Aggregate, Figure


@dataclass
class Metric:
    """rows [n, ...]: what each item gives; aggregate: the figure of some of them. share: rows are 0 or 1 and the figure is their mean.

    better: "higher", "lower", or "" for what is neither, such as a share of stereotypes, of which the middle is best.
    """

    rows: Sequence[Any]
    aggregate: Aggregate = statistics.mean
    share: bool = False
    better: str = "higher"

    def figure(self, confidence: float) -> Figure:
        if self.share:
            return statistics.wilson(int(sum(self.rows)), len(self.rows), confidence)
        return statistics.bootstrap(np.asarray(self.rows), self.aggregate, confidence=confidence)


@dataclass
class Measured:
    """name: of the task, such as its file. kind: its shape. main: the metric that comparisons judge. note: what a reader should know."""

    name: str
    kind: str
    main: str
    metrics: dict[str, Metric]
    note: str = ""
    examples: list[dict[str, Any]] = field(default_factory=list)

    def figures(self, confidence: float = 0.95) -> dict[str, Figure]:
        return {name: metric.figure(confidence) for name, metric in self.metrics.items()}


def shares(rows: Sequence[bool], better: str = "higher") -> Metric:
    return Metric([float(row) for row in rows], share=True, better=better)


def ratio(better: str, transform: Callable[[float], float] = lambda value: value) -> tuple[Aggregate, str]:
    """The transformed ratio of the sums of rows (numerator, denominator)."""

    def aggregate(rows: np.ndarray) -> float:
        total = rows[:, 1].sum()
        return transform(float(rows[:, 0].sum() / total)) if total else math.nan

    return aggregate, better


def by_group(rows: Sequence[bool], groups: Sequence[str], better: str = "", most: int = 24) -> dict[str, Metric]:
    """A share for each group, the most frequent ones first."""
    names = sorted(set(groups), key=lambda name: (-groups.count(name), name))[:most]
    return {
        f"share {name}": shares([row for row, group in zip(rows, groups) if group == name], better) for name in names
    }
