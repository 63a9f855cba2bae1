"""Ctrl-C and SIGTERM end a run after the step that is under way, with a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, after a checkpoint."""

    def __init__(self, sentence: str, signal: int) -> None:
        super().__init__(sentence)
        self.signal = signal


class StopRequest:
    """signal: the one that asked for the end of the run, 0 while none has."""

    signal: int = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM in here only sets `signal`; the second one does what it did before. In the main thread only:
        Python delivers signals to no other. A signal that is ignored, as Ctrl-C in a shell's background jobs, stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        before: dict[int, Any] = {
            n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)
        }

        def ask(number: int, frame: object) -> None:
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)
            print("\nstopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

        try:
            for each in before:
                signal.signal(each, ask)
            yield
        except Exception as error:  # one that the caller may go on after, such as a pruned trial
            if self.signal:
                raise Interrupted(f"stopped by a signal; before that: {error!r}", self.signal) from error
            raise
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
