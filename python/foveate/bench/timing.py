"""Time of functions that take turns: whatever else the machine does meets all of them alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Budget(NamedTuple):
    """How long to go on: until both minima are reached, or the maximum (with 3 samples at least)."""

    min_samples: int = 15
    min_seconds: float = 1.0
    max_seconds: float = 20.0


QUICK = Budget(min_samples=3, min_seconds=0.0, max_seconds=1.0)


class Timing(NamedTuple):
    """Seconds a call: the median, and the interquartile range as its spread."""

    median: float
    iqr: float
    samples: int


def summarize(samples: Sequence[float]) -> Timing:
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples have no spread; take 2 or more")
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, high - low, len(samples))


def interleaved(
    functions: Sequence[Callable[[], object]], budget: Budget | None = None, min_sample_seconds: float = 0.0
) -> list[Timing]:
    """The timing of each function. In every round each runs once, the order turned by one from round to round.

    A sample is one call, or as many as fill min_sample_seconds: for calls too short for the clock. Two calls of each come before.
    """
    budget = budget or Budget()
    repeats = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        once = time.perf_counter() - start
        repeats.append(max(1, math.ceil(min_sample_seconds / once)) if once > 0 else 1)
    samples: list[list[float]] = [[] for _ in functions]
    begin, rounds = time.perf_counter(), 0
    while True:
        spent = time.perf_counter() - begin
        if rounds >= 3 and spent >= budget.max_seconds:
            break
        if rounds >= max(3, budget.min_samples) and spent >= budget.min_seconds:
            break
        for turn in range(len(functions)):
            which = (turn + rounds) % len(functions)
            function, count = functions[which], repeats[which]
            start = time.perf_counter()
            for _ in range(count):
                function()
            samples[which].append((time.perf_counter() - start) / count)
        rounds += 1
    return [summarize(s) for s in samples]
