"""Confidence intervals: Wilson's for shares, the bootstrap for everything else, paired for two models on the same items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
_SEED = 20190

Aggregate = Callable[[np.ndarray], float]


def mean(values: np.ndarray) -> float:
    return float(values.mean())


@dataclass(frozen=True)
class Figure:
    """A number, the ends of its confidence interval, and from how many items it comes. method: how the interval was found."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def to_dict(self) -> dict[str, float | int | str | None]:
        def number(value: float) -> float | None:
            return value if math.isfinite(value) else None  # JSON has no NaN

        return {
            "value": number(self.value), "low": number(self.low), "high": number(self.high), "n": self.n, "interval": self.method,
        }  # fmt: skip


def wilson(successes: int, n: int, confidence: float = 0.95) -> Figure:
    """A share, with Wilson's score interval (1927), which stays within 0 and 1 and holds for few items."""
    _check(confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} items; they must be from 0 to {n}")
    if n == 0:
        return Figure(math.nan, 0.0, 1.0, 0, "wilson")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Figure(share, max(0.0, middle - half), min(1.0, middle + half), n, "wilson")


def bootstrap(
    rows: Sequence[object] | np.ndarray,
    aggregate: Aggregate = mean,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Figure:
    """aggregate(rows), with the percentile interval of the figure over `resamples` draws of the items with replacement.

    rows [n, ...]: what one item gives, such as its score, or its (numerator, denominator). The draws are the same in every call.
    """
    _check(confidence)
    values = np.asarray(rows, dtype=np.float64)
    if len(values) == 0:
        return Figure(math.nan, math.nan, math.nan, 0, "bootstrap")
    drawn = [aggregate(values[draw]) for draw in _draws(len(values), resamples)]
    low, high = _percentiles(np.asarray(drawn), confidence)
    return Figure(aggregate(values), low, high, len(values), "bootstrap")


def share(correct: Sequence[bool], confidence: float = 0.95) -> Figure:
    return wilson(sum(map(bool, correct)), len(correct), confidence)


@dataclass(frozen=True)
class Difference:
    """The difference of two models on the same items, the second less the first. p: how often a draw of the items
    turns the sign, two-sided."""

    value: float
    low: float
    high: float
    p: float
    n: int

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


def paired(
    first: Sequence[object] | np.ndarray, second: Sequence[object] | np.ndarray, aggregate: Aggregate = mean, *,
    confidence: float = 0.95, resamples: int = RESAMPLES,
) -> Difference:  # fmt: skip
    """The paired bootstrap (Koehn 2004, W04-3250): in each draw both models have the same items. ValueError for unequal
    numbers of items."""
    _check(confidence)
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"the models were measured on {len(a)} and {len(b)} items; a paired comparison needs the same ones"
        )
    if len(a) == 0:
        return Difference(math.nan, math.nan, math.nan, 1.0, 0)
    drawn = np.asarray([aggregate(b[draw]) - aggregate(a[draw]) for draw in _draws(len(a), resamples)])
    low, high = _percentiles(drawn, confidence)
    wrong = min(float((drawn <= 0).mean()), float((drawn >= 0).mean()))
    return Difference(aggregate(b) - aggregate(a), low, high, min(1.0, 2 * wrong), len(a))


def _draws(n: int, resamples: int) -> list[np.ndarray]:
    generator = np.random.default_rng(_SEED)
    return [generator.integers(0, n, n) for _ in range(resamples)]


def _percentiles(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1, such as 0.95")
