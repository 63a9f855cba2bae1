"""The time between tokens as a histogram of Prometheus: there is one observation for each token of each stream."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenTimes(Collector):
    """prometheus_client's Histogram goes through its bounds in Python and takes two locks, 3 us in all; this one takes 0.3 us.

    name, text, bounds: as there, with the one label model_name. Only one thread may observe; others may collect.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, tuple(bounds)
        self._counts: dict[str, list[int]] = {}  # by model, in the buckets and beyond
        self._sums: dict[str, float] = {}

    def add(self, model: str) -> None:
        """Its series exist from now on, at 0 if they are new."""
        self._counts.setdefault(model, [0] * (len(self._bounds) + 1))
        self._sums.setdefault(model, 0.0)

    def observe(self, model: str, seconds: float, tokens: int = 1) -> None:
        """So many tokens that came after so many seconds each."""
        self._counts[model][bisect_left(self._bounds, seconds)] += tokens
        self._sums[model] += seconds * tokens

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=["model_name"])
        bounds = [floatToGoString(bound) for bound in (*self._bounds, float("inf"))]
        for model, counts in list(self._counts.items()):
            family.add_metric([model], list(zip(bounds, accumulate(counts))), self._sums[model])
        yield family
