"""How sure the model was of the tokens that it wrote: log-probability and entropy, of a part of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from foveate.serve.jobs import INTERNAL

EVERY, ROWS, KEPT = 8, 4, 4096  # steps of which one is looked at, samples of it, tokens in the window


class TokenMeans(NamedTuple):
    """Over the window: log p(token) and -sum p log p of the model's raw logits, in nats; 0 and 0 of no tokens."""

    logprob: float
    entropy: float
    tokens: int


class TokenProbe:
    """An engine's `on_chosen`. Every eighth step it looks at up to four rows in turn, so that a step costs under a percent more."""

    def __init__(self, every: int = EVERY, rows: int = ROWS, kept: int = KEPT) -> None:
        self._every, self._rows = every, rows
        self._seen: deque[tuple[float, float]] = deque(maxlen=kept)
        self._steps = 0
        self._lock = threading.Lock()

    def __call__(self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], requests: Sequence[str]) -> None:
        self._steps += 1
        if self._steps % self._every:
            return
        chosen = [(row, t) for row, t, name in zip(rows, tokens, requests) if t >= 0 and not name.startswith(INTERNAL)]
        if not chosen:
            return
        first = self._steps // self._every * self._rows % len(chosen)
        picked = (chosen[first:] + chosen[:first])[: self._rows]
        seen = [_look(logits[row], token) for row, token in picked]
        with self._lock:
            self._seen.extend(seen)

    def means(self) -> TokenMeans:
        with self._lock:
            seen = list(self._seen)
        count = len(seen)
        if not count:
            return TokenMeans(0.0, 0.0, 0)
        return TokenMeans(sum(logprob for logprob, _ in seen) / count, sum(value for _, value in seen) / count, count)


def _look(logits: Tensor, token: int) -> tuple[float, float]:
    """Of one row, so that a CPU keeps it in its caches: four at once take three times as long as one after the other."""
    logprobs = logits.float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum()  # 0 for a probability of 0, not NaN
    return float(logprobs[token]), float(entropy)
