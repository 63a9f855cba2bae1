"""PTX for the tests of the PTX machine: of the package's kernels, of test programs, and written by hand."""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cuda_resources import FLAGS
from device_programs import BUILD, ROOT, emulated

KERNELS = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "ptx"  # of the package's kernels

HEAD = """.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];

.visible .entry test(
\t.param .u64 in,
\t.param .u64 out
)
{
\t.reg .pred %p<32>;
\t.reg .b16 %rs<32>;
\t.reg .b32 %r<64>;
\t.reg .f32 %f<64>;
\t.reg .b64 %rd<64>;
\t.reg .f64 %fd<32>;
"""
# %rd1: the lane's place in `in`, %rd2: in `out` (one word each); %r1: the thread.
PLACES = """\tmov.u32 %r1, %tid.x;
\tld.param.u64 %rd1, [in];
\tld.param.u64 %rd2, [out];
\tmul.wide.u32 %rd3, %r1, 4;
\tadd.s64 %rd1, %rd1, %rd3;
\tadd.s64 %rd2, %rd2, %rd3;
"""


def compile_ptx(source: Path, to: Path, arch: str = "80") -> Path:
    """By nvcc, as the package's kernels are compiled."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on the PATH")
    command = ["nvcc", "-ptx", f"-arch=compute_{arch}", "-lineinfo", *FLAGS]
    done = subprocess.run([*command, str(source), "-o", str(to)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return to


def kernels() -> list[Path]:
    """The PTX of every source of the package's kernels, compiled when it is older than any of them. Test processes take turns."""
    sources = [path for path in sorted(KERNELS.rglob("*.cu")) if path.name != "runtime.cu"]
    newest = max(path.stat().st_mtime for path in [*KERNELS.rglob("*.cu*"), *KERNELS.rglob("*.h")])
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old = {FOLDER / f"{source.stem}.ptx": source for source in sources}
        old = {to: source for to, source in old.items() if not to.exists() or to.stat().st_mtime < newest}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: compile_ptx(item[1], item[0]), old.items()))
    return [FOLDER / f"{source.stem}.ptx" for source in sources]


class Result(NamedTuple):
    out: np.ndarray  # 32-bit words
    instructions: int
    seconds: float


def machine() -> Path:
    """The command line of the machine, built on first use."""
    emulated("conformance")  # configures the build
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(["cmake", "--build", str(BUILD), "--target", "ptx_run"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "tests" / "native" / "ptx" / "ptx_run"


class Failed(Exception):
    """What the machine reported."""


def run_file(
    program: Path, file: Path, words: np.ndarray, out_words: int, *,
    entry: str = "test", blocks: int = 1, threads: int = 32, smem: int = 4096,
    schedule: str = "round-robin", seed: int = 0,
) -> Result:  # fmt: skip
    environment = {**os.environ, "FOVEATE_EMULATOR_SCHEDULE": schedule, "FOVEATE_EMULATOR_SEED": str(seed)}
    command = [program, "launch", file, entry, blocks, threads, smem, out_words]
    done = subprocess.run(
        [str(c) for c in command], input=np.ascontiguousarray(words).tobytes(), capture_output=True, env=environment
    )
    if done.returncode != 0:
        raise Failed(done.stderr.decode())
    told = done.stderr.decode().split()
    return Result(np.frombuffer(done.stdout, np.uint32), int(told[0]), float(told[2]))


def run_text(program: Path, folder: Path, body: str, words: np.ndarray, out_words: int, **options) -> Result:
    """Runs an entry with this body, which begins with the places of `in` and `out`."""
    file = folder / "test.ptx"
    file.write_text(HEAD + PLACES + body + "\tret;\n}\n")
    return run_file(program, file, words, out_words, **options)


def entries() -> list[str]:
    """The names of all kernels of the package, as launches are recorded."""
    text = "".join(path.read_text() for path in kernels())
    mangled = sorted(set(re.findall(r"^(?:\.visible )?\.entry (\w+)", text, re.MULTILINE)))
    done = subprocess.run(["c++filt", "-p", *mangled], capture_output=True, text=True, check=True)
    return [line.removeprefix("void ") for line in done.stdout.splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles the package's kernels to PTX and prints the files.")
    parser.add_argument(
        "--launched", type=Path, help="a file of FOVEATE_EMULATOR_PTX_LAUNCHED: say which kernels are not in it"
    )
    args = parser.parse_args()
    if args.launched is None:
        print(*kernels(), sep="\n")
        return 0
    known, launched = entries(), set(args.launched.read_text().splitlines())
    missing = [name for name in known if name not in launched]
    print(
        *(f"not launched: {name}" for name in missing),
        f"{len(known) - len(missing)} of {len(known)} kernels were launched",
        sep="\n",
    )
    return 1 if missing else 0


if __name__ == "__main__":  # for .ci/ptx.sh and .ci/run
    sys.exit(main())
