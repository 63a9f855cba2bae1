"""render: a checkpoint's Jinja chat template, in a process of its own with limits of time and memory."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

from foveate.files.checked import CheckpointError

SECONDS, MEGABYTES = 2.0, 256  # of the processor, and beyond what the process has at rest, for one rendering
_WAIT = 60.0  # by the clock, for a process that gets no processor


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process that renders chat templates was started without pipes")
    return process.stdin, process.stdout


class _Worker:
    """The process, started at the first use and again after a template has ended it. One rendering at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # a forked child must not write into its parent's pipes

    def render(self, template: str, variables: dict[str, Any]) -> str:
        try:
            line = json.dumps([template, variables])
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages and variables of a chat template must be what JSON can say: {error}") from None
        with self._lock:
            process = self._running()
            stdin, stdout = _pipes(process)
            try:
                stdin.write(line + "\n")
                stdin.flush()
                ready = select.select([stdout], [], [], _WAIT)[0]
                answer = stdout.readline() if ready else ""
            except BrokenPipeError:
                answer = ""
            except BaseException:  # Ctrl-C: an answer that nobody has read must not be the next one's
                self.stop()
                raise
            if not answer:
                raise self._ended(process)
            if answer == '{"memory": true}\n':
                self.stop()  # what is left of it may be large
        reply = json.loads(answer)
        if "text" in reply:
            return reply["text"]
        if "memory" in reply:
            raise CheckpointError(f"the chat template needs more than {MEGABYTES} MB; it is damaged or hostile")
        raise CheckpointError(f"the chat template refuses these messages: {reply['error']}")

    def _running(self) -> subprocess.Popen[str]:
        if self._owner != os.getpid():
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self.stop()
            program = Path(__file__).with_name("template_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, encoding="utf-8",
            )  # fmt: skip
            start = {"path": list(map(str, sys.path)), "seconds": SECONDS, "bytes": MEGABYTES << 20}
            _pipes(self._process)[0].write(json.dumps(start) + "\n")
        return self._process

    def _ended(self, process: subprocess.Popen[str]) -> CheckpointError:
        try:
            status: int | None = process.wait(1)
        except subprocess.TimeoutExpired:
            status = None
        self.stop()
        if status is None:
            return CheckpointError(f"the chat template gave nothing within {_WAIT:g} s")
        if status in (-signal.SIGPROF, -signal.SIGXCPU):
            return CheckpointError(
                f"the chat template took more than {SECONDS:g} s of the processor; it is damaged or hostile"
            )
        return CheckpointError(f"the chat template ended its process (exit status {status}); it is damaged or hostile")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # of what was never written
                        stream.close()


_worker = _Worker()
atexit.register(_worker.stop)


def render(template: str, variables: dict[str, Any]) -> str:
    """The text. ValueError for variables that JSON cannot say; CheckpointError with what the template says or does wrong."""
    return _worker.render(template, variables)
