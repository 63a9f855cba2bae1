"""Builds the package into this environment, for development, and shows what is being compiled, with a count and the time left.

    python tools/develop.py                      # every instruction set, and CUDA where nvcc is found
    python tools/develop.py --for-this-machine   # this CPU's instruction set; CUDA only where a driver is found, too

The install is editable: a change of a Python file needs nothing, and after a change of a C++ file this compiles what depends on it.
What a wider build has compiled is kept by a narrower one, and the other way round only what is missing is compiled. FOVEATE_CPU_TARGETS
and FOVEATE_CUDA (docs/install.md) overrule the choice. The whole output of the compilers is in build/build.log.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build" / "build.log"
# pip indents the lines; %f finished, %t of them all, %W the time that ninja expects for the rest.
NINJA_STATUS = "[%f/%t %W] "
STEP = re.compile(r"^\s*\[(\d+)/(\d+) ([\d:?]+)\] (.*)")
OBJECT = re.compile(r"CMakeFiles/(\w+)\.dir/(.*)\.o$")
# Between two lines where the output is not a terminal: of steps that end, and of one that takes long.
PLAIN_SECONDS, PLAIN_SECONDS_OF_ONE = 5, 30

INSTALL = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
REBUILD = [sys.executable, "-c", """
import importlib.util, subprocess, sys
try:
    importlib.util.find_spec("foveate").loader.rebuild()
except subprocess.CalledProcessError as error:
    sys.exit(error.returncode)
"""]  # fmt: skip


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def choices(for_this_machine: bool) -> dict[str, str]:
    """The CMake options, as variables of the environment (pyproject.toml hands them on)."""
    targets, cuda = ("native", "AUTO" if has_driver() else "OFF") if for_this_machine else ("all", "AUTO")
    defaults = {"FOVEATE_CPU_TARGETS": targets, "FOVEATE_CUDA": cuda}
    return {name: os.environ.get(name) or default for name, default in defaults.items()}


def covers(built: dict[str, str], wanted: dict[str, str]) -> bool:
    """A build of everything serves who wants less; a choice that the user has typed is taken as it is."""
    return all(
        built[name] == value or (name not in os.environ and built[name] in ("all", "AUTO"))
        for name, value in wanted.items()
    )


def fingerprint() -> str:
    """What makes an editable install stale: its own settings, and which Python files there are (it has a list of them)."""
    modules = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "python").rglob("*.py"))
    settings = [(ROOT / name).read_text() for name in ("pyproject.toml", "requirements/build.txt")]
    return hashlib.sha256(json.dumps([str(ROOT), modules, settings]).encode()).hexdigest()


def name_of(step: str) -> str:
    """`csrc/cpu/linear/linear.cpp for amx` of ninja's description of a step."""
    found = OBJECT.search(step)
    if found is None:
        return step.replace("CXX shared module ", "")
    target, source = found.groups()
    return f"{source} for {target.removeprefix('cpu_')}" if target.startswith("cpu_") else source


def clock(seconds: float) -> str:
    return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


class Progress:
    """One line that is rewritten on a terminal; elsewhere a whole line every few seconds."""

    def __init__(self, out: TextIO) -> None:
        self.out, self.terminal = out, out.isatty()
        self.start = self.printed = time.monotonic()
        self.done, self.total, self.name = 0, 0, "preparing"
        self.left: float | None = None  # seconds, as of `heard`
        self.heard = self.start

    def step(self, done: int, total: int, left: str, name: str) -> None:
        self.done, self.total, self.name, self.heard = done, total, name, time.monotonic()
        parts = left.split(":")
        self.left = None if "?" in left else sum(60**i * int(part) for i, part in enumerate(reversed(parts)))
        self.show(last=done == total)

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        wait = PLAIN_SECONDS if self.heard > self.printed else PLAIN_SECONDS_OF_ONE
        if not self.terminal and not last and now - self.printed < wait:
            return
        self.printed = now
        text = f"[{self.done}/{self.total}] {self.name}, {clock(now - self.start)}" if self.total else self.name
        if self.total and self.left is not None and not last:
            text += f", about {clock(max(self.left - (now - self.heard), 1))} left"
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            self.out.write(f"\r{text[:width]}\x1b[K")
        else:
            self.out.write(text + "\n")
        self.out.flush()

    def say(self, text: str) -> None:
        self.out.write(f"\r{text}\x1b[K\n" if self.terminal else text + "\n")
        self.out.flush()

    def end(self) -> None:
        if self.terminal:
            self.out.write("\r\x1b[K")
            self.out.flush()


def run(command: list[str], environment: dict[str, str], progress: Progress) -> None:
    """Runs a command that ends in ninja and shows its steps. If it fails, prints what the compiler said and exits."""
    LOG.parent.mkdir(exist_ok=True)
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: TextIO) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    failed_at, heard = 0, []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with LOG.open("w") as log, subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as process:
        threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=1)
            except queue.Empty:
                progress.show()
                continue
            if line is None:
                break
            log.write(line)
            log.flush()
            heard.append(line)
            if (found := STEP.match(line)) and found[1] != "0":  # before the first, ninja looks for new files
                done, total, left, step = found.groups()
                progress.step(int(done), int(total), left, name_of(step))
            elif "-- foveate: " in line:
                progress.say(line.strip().removeprefix("-- "))
            elif not failed_at and ("FAILED:" in line or "CMake Error" in line):
                failed_at = len(heard) - 1
    progress.end()
    if process.returncode != 0:
        sys.stderr.write("".join(heard[failed_at:][:80] if failed_at else heard[-40:]))
        sys.exit(f"The build failed after {clock(time.monotonic() - progress.start)}; {LOG} has the whole output.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for-this-machine", action="store_true", help="no more than this machine can run")
    wanted = choices(parser.parse_args().for_this_machine)
    if not shutil.which("cmake"):
        sys.exit("foveate needs cmake >= 3.20 to build: apt-get install cmake, or pip install cmake")
    if not shutil.which(os.environ.get("CXX", "c++")):
        sys.exit("foveate needs a C++20 compiler to build: apt-get install g++")
    stamp = Path(sys.prefix) / ".foveate-build.json"
    built = json.loads(stamp.read_text()) if stamp.exists() else None
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    environment = os.environ | {"PATH": path, "NINJA_STATUS": NINJA_STATUS}
    environment.pop("PYTHONPATH", None)  # another foveate there would go first
    progress = Progress(sys.stdout)
    if built is not None and built["fingerprint"] == fingerprint() and covers(built["options"], wanted):
        run(REBUILD, environment | {"SKBUILD_EDITABLE_VERBOSE": "1"}, progress)
    else:
        stamp.unlink(missing_ok=True)
        run(INSTALL, environment | wanted, progress)
        stamp.write_text(json.dumps({"fingerprint": fingerprint(), "options": wanted}))
    if progress.total:
        progress.say(f"built in {clock(time.monotonic() - progress.start)}")


if __name__ == "__main__":
    main()
