"""Learning-rate schedules: the factor on the learning rate at each step."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "wsd", "constant")


def rate_factor(
    step: int, steps: int, *, schedule: str, warmup_steps: int, min_factor: float = 0.0, decay_share: float = 0.2
) -> float:
    """For step 0 .. steps - 1. Warm-up is linear, from 1 / warmup_steps at step 0 to 1 at step warmup_steps - 1.

    After it, with t from 0 to 1 over the rest: "cosine" m + (1 - m) (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2016), "linear"
    1 - (1 - m) t, "wsd" 1 until the last decay_share of all steps and linear from there to m (warm-up, stable, decay: Hu et al.
    2024, arXiv 2404.06395), "constant" 1; m = min_factor.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    first = warmup_steps
    if schedule == "wsd":
        first = max(first, steps - round(decay_share * steps))
    t = max(0, step - first) / max(1, steps - first)
    if schedule == "cosine":
        return min_factor + (1 - min_factor) * (1 + math.cos(math.pi * t)) / 2
    return 1 - (1 - min_factor) * t
