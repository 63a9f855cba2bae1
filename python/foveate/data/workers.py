"""Chunks through a function on all cores, their results in order, each part written once."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from foveate.data.parts import Part
from foveate.progress import ProgressBar

Task = TypeVar("Task")
Work = Callable[[Any], tuple[dict[str, bytes], dict[str, Any]]]  # of a task: the files of its part, and its summary

_PR_SET_PDEATHSIG = 1
_work: Work


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def run(
    tasks: Iterable[tuple[Part, Task, int]], work: Work, *, workers: int | None, bar: ProgressBar
) -> Iterator[dict[str, Any]]:
    """The summaries of all parts, in order. A task is (its part, the argument of work, bytes for the bar); a part that is done is not
    made again. workers: processes; 1 works in this one; None is as many as there are cores."""
    count = cores() if workers is None else workers
    if count < 1:
        raise ValueError(f"workers={workers} must be 1 or more")
    if count == 1:
        with bar:
            for part, task, size in tasks:
                if not part.done:
                    part.write(*work(task))
                bar.advance(size)
                yield part.summary()
        return
    # fork: the work of this module needs no torch and starts at once; the bar, a thread, begins after the processes
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _start, (work, os.getpid()))
    waiting: deque[tuple[Part, int, Future[None] | None]] = deque()
    try:
        pool.submit(int).result()
        with bar:
            for part, task, size in tasks:
                waiting.append((part, size, None if part.done else pool.submit(_make, part, task)))
                while len(waiting) > 3 * count:
                    yield _next(waiting, bar)
            while waiting:
                yield _next(waiting, bar)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process has ended, most likely for want of memory; the same call goes on where this one stopped, with fewer workers "
            "(--workers) if need be"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _next(waiting: deque[tuple[Part, int, Future[None] | None]], bar: ProgressBar) -> dict[str, Any]:
    part, size, future = waiting.popleft()
    if future is not None:
        future.result()
    bar.advance(size)
    return part.summary()


def _start(work: Work, parent: int) -> None:
    """In a worker: it ends with its parent, however that ends, and leaves Ctrl-C to it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _make(part: Part, task: Any) -> None:
    part.write(*_work(task))
