"""Programs that a model wrote, run in a process of their own with limits. It is a fence, not a prison: use a container for hostile code."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

_OUTPUT = 2**16  # bytes that are kept


@dataclass(frozen=True)
class Ran:
    """passed: it ended by itself with status 0. reason: "" or why not."""

    passed: bool
    reason: str
    output: str


@dataclass(frozen=True)
class Limits:
    """seconds: of processor time, and four times as many by the clock. memory: bytes of address space. files: bytes of a written file."""

    seconds: int = 10
    memory: int = 1 << 30
    files: int = 1 << 20
    processes: int = 0

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "files"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")


def run_python(program: str, limits: Limits = Limits()) -> Ran:
    """Runs it with this Python, isolated (-I), in an empty folder that is deleted afterwards, with an empty environment, its standard
    input closed, without the right to start processes, and, where `unshare` is there and allowed, without a network."""
    command = [*_without_network(), sys.executable, "-I", "-c", program]
    with tempfile.TemporaryDirectory(prefix="foveate-code-") as folder:
        environment = {"PATH": "/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        with open(os.path.join(folder, ".output"), "w+b") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=lambda: _limit(limits),
            )  # fmt: skip
            try:
                status: int | None = process.wait(4 * limits.seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill(process)
            output.seek(0)
            text = output.read(_OUTPUT).decode("utf-8", "replace")
    if status == 0:
        return Ran(True, "", text)
    if status is None or status in (-signal.SIGXCPU, -signal.SIGKILL, 128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return Ran(False, f"it ran longer than {limits.seconds} s", text)
    last = text.strip().rpartition("\n")[2]
    return Ran(False, last[:200] or f"it ended with status {status}", text)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """It and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _limit(limits: Limits) -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, limits.seconds), (resource.RLIMIT_AS, limits.memory), (resource.RLIMIT_FSIZE, limits.files),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 64),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))
    if os.geteuid() != 0:  # the limit counts all processes of a user, and does not hold for root
        resource.setrlimit(resource.RLIMIT_NPROC, (limits.processes, limits.processes))


_network: list[str] | None = None


def _without_network() -> list[str]:
    """`unshare --net` where this user may do so."""
    global _network
    if _network is None:
        command = ["unshare", "--net", "--map-root-user"]
        allowed = (
            shutil.which("unshare") is not None
            and not subprocess.run(
                [*command, "true"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            ).returncode
        )
        _network = command if allowed else []
    return _network
