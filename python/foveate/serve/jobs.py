"""A request of a client as the engine runs it: one job for each prompt, of which only the latest output is kept."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from foveate.generation.outputs import RequestOutput
from foveate.generation.params import SamplingParams

INTERNAL = "canary-"  # how the ids of the server's own jobs begin


class Job:
    """One prompt in the engine. Outputs are cumulative, so a client that reads slowly costs no more memory than a fast one."""

    def __init__(
        self,
        job_id: str,
        tokens: list[int],
        params: SamplingParams,
        *,
        grammar: Any = None,
        internal: bool = False,
        priority: int = 0,
    ) -> None:
        self.id, self.tokens, self.params, self.grammar = job_id, tokens, params, grammar
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        self.submitted = time.perf_counter()
        self.started: float | None = None  # when its first step began
        self.progress: deque[tuple[float, int]] = deque()  # after each step its time and the tokens so far, for metrics
        self.counted = 0  # tokens that metrics have seen, the last of them at `counted_at`
        self.counted_at: float | None = None
        self.accounted = False  # its end
        self.internal = internal  # the server's own, which metrics of requests leave out
        self.model: str | None = None  # under which metrics count it, None: its engine's
        self.adapter: str | None = None
        self.salt = ""  # of its pages in the prefix cache
        self.priority, self.turn = priority, 0.0  # lower first; of equal priorities by their turn
        self.call: Call | None = None
        self.begun_again = False  # in another engine, since its own hung
        self.screen: Any = None  # an OutputScreen, through which the guard lets outputs

    def begin_again(self) -> None:
        self.begun_again = True
        self.output, self.started = None, None
        self.progress.clear()
        if self.screen is not None:
            self.screen = self.screen.again()

    @property
    def finished(self) -> bool:
        return self.error is not None or (self.output is not None and self.output.finished)

    @property
    def latest(self) -> RequestOutput:
        """The output so far. RuntimeError before the first."""
        if self.output is None:
            raise RuntimeError(f"request {self.id} has no output yet")
        return self.output

    @property
    def generated(self) -> int:
        if self.output is None:
            return 0
        samples = self.output.outputs
        return len(samples[0].token_ids) if len(samples) == 1 else sum(len(sample.token_ids) for sample in samples)

    def wake(self) -> None:
        if self.call is not None:
            self.call.wake()


class Call:
    """The jobs of one HTTP request; all of them wake its one reader."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self._version = 0  # of what there is to read
        self._waiting: asyncio.Future[None] | None = None  # its reader
        self.sent = False  # something of it, to the client
        self.begun = False  # its one job has a token, and admission knows
        for job in jobs:
            job.call = self

    @property
    def samples(self) -> int:
        return sum(job.params.samples for job in self.jobs)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(job.tokens) for job in self.jobs)

    @property
    def most_tokens(self) -> int:
        """The tokens of prompts and, as far as they have a limit, of outputs."""
        new = sum(job.params.samples * (job.params.max_tokens or 0) for job in self.jobs)
        return self.prompt_tokens + new

    @property
    def used_tokens(self) -> int:
        """So far; a prompt counts from its first output on."""
        return sum(len(job.tokens) + job.generated for job in self.jobs if job.output is not None)

    @property
    def finished(self) -> bool:
        return all(job.finished for job in self.jobs)

    def wake(self) -> None:
        self._version += 1
        self._read_on()

    def _read_on(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def raise_failed(self) -> None:
        for job in self.jobs:
            if job.error is not None:
                raise job.error

    async def changes(self, patience: float | None = None) -> AsyncIterator[bool]:
        """After a change True, after `patience` seconds without one False; ends after the last. Raises what a job failed with."""
        loop, seen = asyncio.get_running_loop(), 0
        since, timer = loop.time(), None

        def look(patience: float) -> None:  # a timer for each `patience`, not for each change
            nonlocal timer
            left = since + patience - loop.time()
            timer = loop.call_later(left if left > 0 else patience, look, patience)
            if left <= 0:
                self._read_on()

        if patience is not None:
            timer = loop.call_later(patience, look, patience)
        try:
            while True:
                if self._version == seen:
                    self._waiting = loop.create_future()
                    await self._waiting
                self.raise_failed()
                changed, seen, since = self._version != seen, self._version, loop.time()
                ended = self.finished
                yield changed
                if ended:
                    return
        finally:
            if timer is not None:
                timer.cancel()

    async def result(self) -> list[RequestOutput]:
        async for _ in self.changes():
            pass
        return [job.output for job in self.jobs if job.output is not None]
