"""Registers, spills and stack frames of every CUDA kernel, for sm_80 and sm_90a, held against a committed list.

    python tools/cuda_resources.py              # compiles csrc/cuda/*/*.cu; a kernel that spills or has a stack frame must be listed
    python tools/cuda_resources.py --table      # prints all kernels
    python tools/cuda_resources.py rows/softmax.cu   # one file

The list is tools/cuda_spills.txt: lines of "arch kernel bytes-of-stack bytes-spilled # reason", each an upper limit. A kernel is named
without its namespace, with its template arguments. A line that no kernel needs any more is a failure too.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tools" / "cuda_spills.txt"
ARCHS = ("sm_80", "sm_90a")
# As CMakeLists.txt compiles them.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    f"-I{ROOT / 'csrc'}",
    f"-I{ROOT / 'csrc/cuda/device/nvidia'}",
    "-DFOVEATE_WITH_CUDA",
]


class Kernel(NamedTuple):
    arch: str
    name: str
    registers: int
    stack: int  # bytes
    spilled: int  # bytes of spill stores and loads

    @property
    def clean(self) -> bool:
        return self.stack == 0 and self.spilled == 0


def demangle(names: list[str]) -> list[str]:
    """Without arguments and the namespaces that every kernel has."""
    done = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True)
    return [
        re.sub(r"foveate::|cuda::|_GLOBAL__N__\w+::|\s", "", line.removeprefix("void "))
        for line in done.stdout.splitlines()
    ]


def parse(log: str, arch: str) -> list[Kernel]:
    """What ptxas -v says of each entry function."""
    entry = re.compile(
        rf"Compiling entry function '(\w+)' for '{arch}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    found = entry.findall(log)
    names = demangle([f[0] for f in found]) if found else []
    return [Kernel(arch, name, int(f[4]), int(f[1]), int(f[2]) + int(f[3])) for name, f in zip(names, found)]


def compile_kernels(source: Path, arch: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch={arch}", "-cubin", "-Xptxas=-v", "-o", f"{folder}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return parse(done.stdout + done.stderr, arch)


def allowed(path: Path) -> dict[tuple[str, str], tuple[int, int]]:
    limits = {}
    for line in path.read_text().splitlines():
        words = line.split("#")[0].split()
        if words:
            arch, name, stack, spilled = words
            limits[arch, name] = (int(stack), int(spilled))
    return limits


def faults(kernels: list[Kernel], limits: dict[tuple[str, str], tuple[int, int]]) -> list[str]:
    """Kernels beyond their limits. Without a line in the list the limits are 0."""
    sentences = []
    for k in kernels:
        stack, spilled = limits.get((k.arch, k.name), (0, 0))
        if k.stack > stack or k.spilled > spilled:
            sentences.append(
                f"{k.arch} {k.name}: {k.stack} bytes of stack and {k.spilled} spilled, with {k.registers} registers; "
                f"allowed are {stack} and {spilled}"
            )
    return sentences


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print every kernel")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("files", nargs="*", help="paths below csrc/cuda; all if none is given")
    args = parser.parse_args()
    folder = ROOT / "csrc" / "cuda"
    sources = sorted(folder.rglob("*.cu"))
    if args.files:
        sources = [s for s in sources if str(s.relative_to(folder)) in args.files]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(compile_kernels, source, arch) for source in sources for arch in ARCHS]
        kernels = sorted(k for job in jobs for k in job.result())
    if args.table:
        for k in kernels:
            print(f"{k.arch:7} {k.registers:4} registers {k.stack:5} stack {k.spilled:5} spilled  {k.name}")
    limits = allowed(LIST)
    sentences = faults(kernels, limits)
    if not args.files:
        dirty = {(k.arch, k.name) for k in kernels if not k.clean}
        sentences += [
            f"{LIST.name}: {' '.join(line)} spills no more; take the line out" for line in limits if line not in dirty
        ]
    print("\n".join(sentences), file=sys.stderr, end="\n" if sentences else "")
    print(f"{len(kernels)} kernels, at most {max((k.registers for k in kernels), default=0)} registers")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
