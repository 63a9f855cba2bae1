"""The thread in which an engine steps. The event loop hands it jobs and takes outputs; neither waits for the other."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from foveate.generation.engine import Engine
from foveate.generation.outputs import RequestOutput
from foveate.serve import watchdog
from foveate.serve.errors import ApiError, refused
from foveate.serve.jobs import Job
from foveate.serve.processors import Processors
from foveate.serve.recovery import recover

log = logging.getLogger("foveate.serve")


class StepFacts(NamedTuple):
    """One step: how long it took, how long of that in kernels where the model tells, and the samples that got a token in it."""

    seconds: float
    kernel_seconds: float | None
    samples: int


class EngineWorker:
    """Steps `engine` while it has work. What is submitted or aborted takes effect before the next step, whatever runs.

    on_outputs: called in the event loop after each step, with the jobs that changed. Where the model says when its kernels begin
    (NativeDecoder), the event loop gets a step's outputs then, in the next step: while kernels run, it keeps no Python of the engine
    waiting for the interpreter's lock.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        on_outputs: Callable[[list[Job]], None] = lambda jobs: None,
        processors: Processors | None = None,
    ) -> None:
        self.engine, self._loop, self._on_outputs = engine, loop, on_outputs
        self._processors = processors
        engine.weights_fixed = True
        self._condition = threading.Condition()
        self._inbox: list[tuple[str, Any]] = []
        self._jobs: dict[str, Job] = {}  # in the engine; the thread's own
        self._stopping = False
        self._since: float | None = None  # since when there has been work without a finished step
        self.last_step = StepFacts(0.0, None, 0)
        self.failed_steps = 0
        self._turn = 0  # of the thread that steps; those of earlier ones are left behind
        self._held: list[Job] = []  # that changed, of which the event loop has not been told
        self._overlaps = False  # whether the step that runs, or was the last, had kernels to tell it in
        self._thread = self._new_thread()

    def start(self) -> None:
        self._thread.start()

    def submit(self, jobs: Iterable[Job]) -> None:
        self._post([("add", job) for job in jobs])

    def abort(self, jobs: Iterable[Job]) -> None:
        """The jobs leave the engine before its next step; their pages are free then. Those that have finished are left alone."""
        self._post([("abort", job) for job in jobs if not job.finished])

    def between_steps(self, function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """What it returns, run in the engine's thread, after the step that runs now, if one does."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._post([("call", (function, future))])
        return future

    def stop(self, patience: float = 5.0) -> None:
        with self._condition:
            self._stopping = True
            self._condition.notify()
        if self._thread.ident is not None:
            self._thread.join(patience)

    @property
    def stalled_for(self) -> float:
        """Seconds since the last step ended, 0 while there is nothing to do."""
        since = self._since
        return 0.0 if since is None else max(0.0, time.monotonic() - since)

    @property
    def restarts(self) -> int:
        return self._turn

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing is about to."""
        return not (self._jobs or self._inbox)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _post(self, commands: list[tuple[str, Any]]) -> None:
        with self._condition:
            if commands and self._since is None:
                self._since = time.monotonic()
            self._inbox += commands
            self._condition.notify()

    def restart(self, engine: Engine) -> tuple[int, int]:
        """Goes on with another engine in another thread; the old thread ends when its step does, and what it brings is dropped.

        Jobs of which no client has seen anything begin again, once; the others are ended. How many of both.
        """
        with self._condition:
            self._turn += 1
            old, self._jobs = self._jobs, {}
            held, self._held = self._held, []
            self.engine = engine
            engine.weights_fixed = True
            again = [
                job for job in old.values() if not job.begun_again and not (job.call is not None and job.call.sent)
            ]
            lost = [job for job in old.values() if job not in again]
            for job in again:
                job.begin_again()
            self._inbox = [("add", job) for job in again] + self._inbox
            self._since = time.monotonic() if self._inbox else None
            self._thread = self._new_thread()
            self._thread.start()
        for job in lost:
            job.error = watchdog.ended(job.id)
        if held or lost:
            self._deliver(held + lost)
        return len(again), len(lost)

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, args=(self._turn,), name="foveate-engine", daemon=True)

    def _run(self, turn: int) -> None:
        if self._processors is not None:
            self._processors.use_model()
        while True:
            with self._condition:
                while self._turn == turn and not (self._inbox or self._stopping or self.engine.has_work):
                    self._since = None
                    self._condition.wait()
                if self._stopping or self._turn != turn:
                    return
                commands, self._inbox = self._inbox, []
                self._since = time.monotonic()
            refusals = [job for kind, job in commands if not self._obey(kind, job)]
            if refusals:
                self._deliver(refusals)
            if self.engine.has_work:
                self._step(turn)
            else:  # the last ones that ran were aborted
                self._release(turn)

    def _obey(self, kind: str, job: Any) -> bool:
        """False for a job that the engine refuses."""
        if kind == "call":
            function, future = job
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
            return True
        if kind == "abort":
            if self._jobs.pop(job.id, None) is not None:
                self.engine.abort(job.id)
            return True
        try:
            self.engine.add(
                job.id,
                job.tokens,
                job.params,
                stream=True,
                grammar=job.grammar,
                priority=(job.priority, job.turn),
                adapter=job.adapter,
                salt=job.salt,
            )
        except (ValueError, TypeError) as error:
            job.error = refused(error)
            return False
        except Exception:
            log.exception("a request could not be added", extra={"job": job.id})
            job.error = _failed(job)
            return False
        self._jobs[job.id] = job
        return True

    def _step(self, turn: int) -> None:
        began, engine = time.perf_counter(), self.engine
        in_kernels = getattr(engine.model, "kernel_seconds", None)
        lost: list[str] = []
        self._overlaps = False
        if hasattr(engine.model, "before_kernels"):
            engine.model.before_kernels = functools.partial(self._release, turn)
        try:
            outputs = engine.step()
        except Exception:
            self.failed_steps += 1
            log.exception("a step of the engine failed; each request that ran is tried alone")
            outputs, lost = recover(engine)
        with self._condition:
            if self._turn != turn:  # it took too long, and another thread has gone on
                return
            now = time.perf_counter()
            kernels = None if in_kernels is None else engine.model.kernel_seconds - in_kernels
            self.last_step = StepFacts(now - began, kernels, sum(len(output.outputs) for output in outputs))
            for sample in engine.scheduler.running:
                self._mark_started(sample.request.id, began)
            changed = [job for output in outputs if (job := self._read(output, began, now)) is not None]
            for request_id in lost:
                job = self._jobs.pop(request_id, None)
                if job is not None:
                    job.error = _failed(job)
                    changed.append(job)
            self._held += changed
        if not (self._overlaps and engine.has_work):
            self._release(turn)

    def _release(self, turn: int) -> None:
        if self._turn != turn:
            return
        self._overlaps = True
        held, self._held = self._held, []
        if held:
            self._deliver(held)

    def _mark_started(self, request_id: str, began: float) -> None:
        job = self._jobs.get(request_id)
        if job is not None and job.started is None:
            job.started = began

    def _read(self, output: RequestOutput, began: float, now: float) -> Job | None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return None
        if job.started is None:  # its first step was its last
            job.started = began
        try:
            job.output = output if job.screen is None else job.screen(output)
        except Exception:
            log.exception("the guard failed on a request", extra={"job": job.id})
            job.error = _failed(job)
        job.progress.append((now, job.generated))
        if job.finished:
            del self._jobs[output.request_id]
            if not output.finished:
                self.engine.abort(output.request_id)
        return job

    def _deliver(self, jobs: list[Job]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._wake, jobs)
        except RuntimeError:  # the loop has closed: nobody waits any more
            self._stopping = True

    def _wake(self, jobs: list[Job]) -> None:
        self._on_outputs(jobs)
        for job in jobs:
            job.wake()


def _failed(job: Job) -> ApiError:
    return ApiError(
        500, f"the engine failed on this request ({job.id}); the server's log has the reason", code="engine_error"
    )


def facts(engine: Engine) -> dict[str, Any]:
    """What is running, read without a lock: numbers that are one step old at the most."""
    scheduler = engine.scheduler
    held = 0 if scheduler.prefix is None else scheduler.prefix.evictable()
    return {
        "running": len(scheduler.running),
        "waiting": len(scheduler.waiting),
        "pages": engine.num_pages,
        "free_pages": engine.cache.free_pages,
        "evictable_pages": held,
    }
