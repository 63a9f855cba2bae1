"""How sure the model was of the tokens that it wrote: log-probability and entropy, of a part of them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from foveate.generation.request import Request
from foveate.serve.jobs import INTERNAL

EVERY, ROWS, KEPT = 8, 4, 4096  # steps of which one is looked at, samples of it, tokens in the window


class TokenMeans(NamedTuple):
    """Over the window: log p(token) and -sum p log p of the model's raw logits, in nats; 0 and 0 of no tokens."""

    logprob: float
    entropy: float
    tokens: int


class TokenWindow:
    """The last tokens of a model that were looked at. Written by the engine's thread, read by another."""

    def __init__(self, kept: int = KEPT) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=kept)
        self._lock = threading.Lock()

    def add(self, logprob: float, entropy: float) -> None:
        with self._lock:
            self._seen.append((logprob, entropy))

    def means(self) -> TokenMeans:
        with self._lock:
            seen = list(self._seen)
        count = len(seen)
        if not count:
            return TokenMeans(0.0, 0.0, 0)
        return TokenMeans(sum(logprob for logprob, _ in seen) / count, sum(value for _, value in seen) / count, count)


class TokenProbe:
    """An engine's `on_chosen`. Every eighth step it looks at up to four rows in turn, so that a step costs under a percent more.

    window_of: gives the window that a request's tokens belong to, by the name of its adapter, None without one.
    """

    def __init__(self, window_of: Callable[[str | None], TokenWindow], every: int = EVERY, rows: int = ROWS) -> None:
        self._window_of, self._every, self._rows = window_of, every, rows
        self._steps = 0

    def __call__(self, logits: Tensor, rows: Sequence[int], tokens: Sequence[int], requests: Sequence[Request]) -> None:
        self._steps += 1
        if self._steps % self._every:
            return
        chosen = [
            (row, token, request)
            for row, token, request in zip(rows, tokens, requests)
            if token >= 0 and not request.id.startswith(INTERNAL)
        ]
        if not chosen:
            return
        first = self._steps // self._every * self._rows % len(chosen)
        for row, token, request in (chosen[first:] + chosen[:first])[: self._rows]:
            adapter = None if request.adapter is None else request.adapter.name
            self._window_of(adapter).add(*_look(logits[row], token))


def _look(logits: Tensor, token: int) -> tuple[float, float]:
    """Log-probability and entropy in one row, which stays in a CPU's caches: four at once take three times as long as four by turns."""
    logprobs = logits.float().log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum()  # 0 for a probability of 0, not NaN
    return float(logprobs[token]), float(entropy)
