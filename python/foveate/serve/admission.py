"""Who comes in: a bounded number of samples and of waiting prompt tokens, reserved in the same moment as they are checked."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from foveate.serve.errors import ApiError, bad_request
from foveate.serve.jobs import Call
from foveate.serve.limits import Turns

_UNKNOWN = 256  # tokens that a sample without max_tokens is taken to cost


class Admission:
    """For one model; only the event loop calls it, so nothing comes between a check and its reservation.

    places: samples that run at once. max_queue: samples beyond them. max_queue_tokens: prompt tokens of requests without a first token.
    shared: between keys, none of which may fill more than half of the queue.
    """

    def __init__(self, places: int, max_queue: int, max_queue_tokens: int, *, shared: bool = False) -> None:
        self.places, self.max_queue, self.max_queue_tokens = places, max_queue, max_queue_tokens
        self.shared = shared
        self.turns = Turns()
        self.samples = 0
        self._of_key: Counter[str] = Counter()  # samples
        self._waiting: set[Call] = set()  # without a first token
        self.rejected = 0
        self._left: deque[tuple[float, int]] = deque(maxlen=64)  # when so many samples left

    @property
    def waiting_tokens(self) -> int:
        return sum(call.prompt_tokens for call in self._waiting)

    @contextmanager
    def place(self, call: Call, key: str = "") -> Iterator[None]:
        """Holds the call's places while it lasts. ApiError 429 when there are none, 400 when there never will be. key: whose it is."""
        capacity = self.places + self.max_queue
        if call.samples > capacity:
            raise bad_request(
                f"this request wants {call.samples} samples at once, and the server takes {capacity} in all; send fewer prompts, or lower n"
            )
        if self.samples + call.samples > capacity:
            self.rejected += 1
            raise self._full(
                f"{self.samples} samples run or wait, of at most {capacity}, and this request wants {call.samples}",
                call.samples,
            )
        most = self.places + self.max_queue // 2
        if self.shared and self._of_key[key] and self._of_key[key] + call.samples > most:
            self.rejected += 1
            raise self._full(
                f"{self._of_key[key]} samples of this key run or wait, of at most {most}, and this request wants {call.samples}",
                call.samples,
            )
        waiting = self.waiting_tokens
        if waiting and waiting + call.prompt_tokens > self.max_queue_tokens:
            self.rejected += 1
            raise self._full(
                f"prompts of {waiting} tokens wait, of at most {self.max_queue_tokens}, and this one has {call.prompt_tokens}",
                1,
            )
        self.samples += call.samples
        self._of_key[key] += call.samples
        self._waiting.add(call)
        for job in call.jobs:
            job.turn = self.turns.tag(key, len(job.tokens) + job.params.samples * (job.params.max_tokens or _UNKNOWN))
        try:
            yield
        finally:
            self.samples -= call.samples
            self._of_key[key] -= call.samples
            if not self._of_key[key]:
                del self._of_key[key]
            self._waiting.discard(call)
            self._left.append((time.monotonic(), call.samples))

    def began(self, call: Call) -> None:
        """The call has its first token."""
        self._waiting.discard(call)

    def _full(self, why: str, wanted: int) -> ApiError:
        after = self.retry_after(wanted)
        return ApiError(429, f"the server is full: {why}; try again in {after} s", code="queue_full", retry_after=after)

    def retry_after(self, wanted: int) -> int:
        """Seconds until so many samples have left, at the rate of the last 64 requests: 1 to 60, 5 without any."""
        now = time.monotonic()
        recent = [(at, count) for at, count in self._left if now - at < 60]
        if not recent:
            return 5
        rate = sum(count for _, count in recent) / max(now - recent[0][0], 0.1)
        return int(min(60, max(1, -(-wanted // rate))))
