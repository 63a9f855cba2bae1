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
        self.priority, self.turn = priority, 0.0  # lower first; of equal priorities by their turn
        self.call: Call | None = None
        self.begun_again = False  # in another engine, since its own hung

    def begin_again(self) -> None:
        self.begun_again = True
        self.output, self.started = None, None
        self.progress.clear()

    @property
    def finished(self) -> bool:
        return self.error is not None or (self.output is not None and self.output.finished)

    @property
    def generated(self) -> int:
        return 0 if self.output is None else sum(len(sample.token_ids) for sample in self.output.outputs)

    def wake(self) -> None:
        if self.call is not None:
            self.call.version += 1
            self.call.changed.set()


class Call:
    """The jobs of one HTTP request; all of them wake its one reader."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.changed = asyncio.Event()
        self.version = 0
        self.sent = False  # something of it, to the client
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
        """Of prompts and, as far as they have a limit, of outputs."""
        new = sum(job.params.samples * (job.params.max_tokens or 0) for job in self.jobs)
        return self.prompt_tokens + new

    @property
    def used_tokens(self) -> int:
        """So far; a prompt counts from its first output on."""
        return sum(len(job.tokens) + job.generated for job in self.jobs if job.output is not None)

    @property
    def finished(self) -> bool:
        return all(job.finished for job in self.jobs)

    def raise_failed(self) -> None:
        for job in self.jobs:
            if job.error is not None:
                raise job.error

    async def changes(self, patience: float | None = None) -> AsyncIterator[bool]:
        """After a change True, after `patience` seconds without one False; ends after the last. Raises what a job failed with."""
        loop, seen = asyncio.get_running_loop(), 0
        while True:
            timer = None if patience is None else loop.call_later(patience, self.changed.set)
            await self.changed.wait()
            if timer is not None:
                timer.cancel()
            self.changed.clear()
            self.raise_failed()
            changed, seen = self.version != seen, self.version
            ended = self.finished
            yield changed
            if ended:
                return

    async def result(self) -> list[RequestOutput]:
        async for _ in self.changes():
            pass
        return [job.output for job in self.jobs if job.output is not None]
