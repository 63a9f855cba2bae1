"""Registers and stack frames of every CUDA kernel in the compiled module, held against a committed list.

    python tools/cuda_resources.py                        # of the installed module; a kernel with a stack frame must be listed
    python tools/cuda_resources.py --table                # prints all kernels
    python tools/cuda_resources.py --compile rows/softmax.cu   # compiles one file by nvcc instead, which tells bytes of spills, too

Registers that do not fit are spilled to the stack frame, so a kernel without one does not spill. The list is tools/cuda_spills.txt:
lines of "arch kernel bytes-of-stack # reason", each an upper limit. A kernel is named without its namespace, with its template arguments.
A line that no kernel needs any more is a failure too.
"""

from __future__ import annotations

import argparse
import re
import shutil
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
    """spilled: bytes of spill stores and loads, which only the compiler tells."""

    arch: str
    name: str
    registers: int
    stack: int  # bytes
    spilled: int | None = None


def demangle(names: list[str]) -> list[str]:
    """Without arguments and the namespaces that every kernel has."""
    if not names:
        return []
    done = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True)
    return [
        re.sub(r"foveate::|cuda::|_GLOBAL__N__\w+::|\s", "", line.removeprefix("void "))
        for line in done.stdout.splitlines()
    ]


def read_module(listing: str) -> list[Kernel]:
    """What cuobjdump --dump-resource-usage says of each function, under the architecture of its section."""
    rows = []
    for section in re.split(r"^Fatbin \w+ code:$", listing, flags=re.MULTILINE)[1:]:
        arch = re.search(r"^arch = (\w+)$", section, re.MULTILINE)
        functions = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", section)
        if functions and arch is None:
            raise ValueError("cuobjdump names no architecture before its functions")
        rows += [(arch[1], name, int(registers), int(stack)) for name, registers, stack in functions if arch]
    names = demangle([row[1] for row in rows])
    return [Kernel(arch, name, registers, stack) for (arch, _, registers, stack), name in zip(rows, names)]


def read_compiler(log: str, arch: str) -> list[Kernel]:
    """What ptxas -v says of each entry function."""
    entry = re.compile(
        rf"Compiling entry function '(\w+)' for '{arch}'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers",
        re.DOTALL,
    )
    rows = entry.findall(log)
    names = demangle([row[0] for row in rows])
    return [
        Kernel(arch, name, int(registers), int(stack), int(stores) + int(loads))
        for (_, stack, stores, loads, registers), name in zip(rows, names)
    ]


def compiled(source: Path, arch: str) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch={arch}", "-cubin", "-Xptxas=-v", "-o", f"{folder}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return read_compiler(done.stdout + done.stderr, arch)


def installed() -> list[Kernel]:
    """The kernels of the module that `import foveate` loads."""
    import triton.backends.nvidia

    from foveate import _C

    tool = shutil.which("cuobjdump") or Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", _C.__file__], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{tool} cannot read {_C.__file__}, which may be built without CUDA: {done.stderr}")
    return read_module(done.stdout)


def read_list(path: Path) -> dict[tuple[str, str], int]:
    limits = {}
    for line in path.read_text().splitlines():
        words = line.split("#")[0].split()
        if words:
            arch, name, stack = words
            limits[arch, name] = int(stack)
    return limits


def faults(kernels: list[Kernel], limits: dict[tuple[str, str], int]) -> list[str]:
    """Kernels beyond their limits. Without a line in the list the limit is 0."""
    return [
        f"{k.arch} {k.name}: {k.stack} bytes of stack, with {k.registers} registers; allowed are {limits.get((k.arch, k.name), 0)}"
        for k in kernels
        if k.stack > limits.get((k.arch, k.name), 0)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print every kernel")
    parser.add_argument(
        "--compile", nargs="+", metavar="FILE", help="compile these files below csrc/cuda and print their kernels"
    )
    args = parser.parse_args()
    if args.compile:
        kernels = [k for file in args.compile for arch in ARCHS for k in compiled(ROOT / "csrc" / "cuda" / file, arch)]
    else:
        kernels = installed()
    if args.table or args.compile:
        for k in sorted(kernels):
            spilled = "" if k.spilled is None else f" {k.spilled:5} spilled"
            print(f"{k.arch:7} {k.registers:4} registers {k.stack:5} stack{spilled}  {k.name}")
    limits = read_list(LIST)
    sentences = faults(kernels, limits)
    if not args.compile:
        if (archs := {k.arch for k in kernels}) != set(ARCHS):
            sentences.append(
                f"the module has kernels for {sorted(archs)}, not for {ARCHS}: build it with FOVEATE_CUDA=ON"
            )
        on_stack = {(k.arch, k.name) for k in kernels if k.stack}
        sentences += [
            f"{LIST.name}: {' '.join(line)} has no stack frame any more; take the line out"
            for line in limits
            if line not in on_stack
        ]
    print("\n".join(sentences), file=sys.stderr, end="\n" if sentences else "")
    print(f"{len(kernels)} kernels, at most {max((k.registers for k in kernels), default=0)} registers")
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
