"""Where and with what a run was made: the columns that every row of a CSV file starts with."""

from __future__ import annotations

import ctypes
import datetime
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import foveate
from foveate.backend import native

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # <malloc.h>


@dataclass(frozen=True)
class Machine:
    commit: str
    date: str
    cpu: str
    cpu_target: str
    threads: int
    torch: str
    foveate: str

    @property
    def line(self) -> str:
        threads = f"{self.threads} thread" + ("" if self.threads == 1 else "s")
        return f"{self.cpu}, {threads}, {self.cpu_target}, torch {self.torch}, {self.date}"

    @property
    def name(self) -> str:
        """The CPU and the instruction set that runs on it, short: "AMD EPYC, avx512_bf16"."""
        cpu = re.sub(r"\((r|tm|c)\)|\b(cpu|processor|\d+-core)\b|@.*", " ", self.cpu, flags=re.IGNORECASE)
        return f"{' '.join(cpu.split()) or 'CPU'}, {self.cpu_target}"

    def stem(self, kind: str, label: str = "") -> str:
        """What a file of results is called: one for each machine and day, and a label for a run that is not the usual one."""
        machine = re.sub(r"[^a-z0-9_]+", "-", self.name.lower()).strip("-")
        return "_".join([kind, machine, self.date, *([label] if label else [])])


def describe() -> Machine:
    return Machine(
        commit=_commit(),
        date=datetime.date.today().isoformat(),
        cpu=_cpu_model(),
        cpu_target=native._C.cpu_target() if native.missing_reason is None else "none",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        foveate=foveate.__version__,
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the working directory, with "+" if files were changed; "" outside of foveate's repository."""
    if not Path("csrc/bindings/module.cpp").exists():
        return ""
    git = ["git", "status", "--porcelain", "--untracked-files=no"], ["git", "rev-parse", "--short=12", "HEAD"]
    changed, head = (subprocess.run(command, capture_output=True, text=True) for command in git)
    return "" if head.returncode else head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed: large results would else be mapped anew in every call, and the page faults timed. For all
    peers alike; glibc only, elsewhere False."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
