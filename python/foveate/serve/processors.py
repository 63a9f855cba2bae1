"""Which processors HTTP keeps for itself, so that a CPU's kernels, whose threads wait for each other, are not held up by it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Processors:
    """http: those of the event loop and of what prepares requests. model: those of engines and encoders."""

    http: frozenset[int]
    model: frozenset[int]

    @classmethod
    def split(cls, count: int) -> Processors | None:
        """The last `count` of those that this process may use are HTTP's; None for 0: all share all.

        ValueError as of `check`. The kernels use no more threads than the model has processors.
        """
        cls.check(count)
        if count == 0:
            return None
        there = sorted(os.sched_getaffinity(0))
        made = cls(frozenset(there[-count:]), frozenset(there[:-count]))
        torch.set_num_threads(min(torch.get_num_threads(), len(made.model)))
        return made

    @staticmethod
    def check(count: int) -> None:
        """ValueError where that leaves none for the model, or the system cannot do it."""
        if count and not hasattr(os, "sched_setaffinity"):
            raise ValueError(f"http_processors={count}: this system does not bind threads to processors; leave it out")
        there = len(os.sched_getaffinity(0)) if count else 1
        if not 0 <= count < there:
            raise ValueError(
                f"http_processors={count} must be from 0 to {there - 1}: this process has {there} processors"
            )

    def use_http(self) -> None:
        """The thread that calls, and those that it starts."""
        os.sched_setaffinity(0, self.http)

    def use_model(self) -> None:
        os.sched_setaffinity(0, self.model)
