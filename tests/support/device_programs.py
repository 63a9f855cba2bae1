"""Builds and runs the C++ programs of tests/native/device: on the emulator, and on a GPU where there is one."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pybind11
import pytest
import torch

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emulator"
SOURCES = ROOT / "tests" / "native" / "device"


def read_golden() -> dict[str, dict[str, list[int]]]:
    cases: dict[str, dict[str, list[int]]] = {}
    for line in (SOURCES / "golden.txt").read_text().splitlines():
        words = line.split()
        if words[-1] in ("in", "out"):
            current = cases.setdefault(words[0], {}).setdefault(words[1], [])
        else:
            current += [int(w, 16) for w in words]
    return cases


GOLDEN = read_golden()  # case -> "in" and "out", 32-bit words
CODES = np.arange(1 << 16, dtype=np.uint32)  # every 16-bit number


def bits(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int32).numpy().view(np.uint32)


WIDENED = {"bf16": torch.bfloat16, "f16": torch.float16, "f8e4m3": torch.float8_e4m3fn}


def check_widening(conformance: Callable[..., np.ndarray], name: str) -> None:
    """The device layer widens every code of a narrow format to the float that torch reads in it."""
    codes = CODES[:256] if name == "f8e4m3" else CODES
    integer = torch.uint8 if name == "f8e4m3" else torch.uint16
    expected = torch.from_numpy(codes.astype(np.int32)).to(integer).view(WIDENED[name]).float()
    out = torch.from_numpy(conformance(f"widen_{name}", codes).view(np.float32).copy())
    assert torch.equal(out.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert np.array_equal(bits(out[number]), bits(expected[number]))


def _run(*command: str | Path, **options) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(str(c) for c in command)}\n{done.stdout}\n{done.stderr}"


def emulated(program: str) -> Path:
    """The program compiled by g++ against the emulator. Test processes take turns to build."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = {**os.environ, "FOVEATE_CUDA": "OFF"}
        if not (BUILD / "build.ninja").exists():
            launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
            _run(
                "cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", "-DFOVEATE_EMULATOR=ON", "-DFOVEATE_CUDA=OFF",
                "-DFOVEATE_CPU_TARGETS=baseline",
                f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *launcher,
                env=environment,
            )  # fmt: skip
        _run("cmake", "--build", BUILD, "--target", f"emulated_{program}", env=environment)
    return BUILD / "tests" / "native" / "device" / f"emulated_{program}"


def for_gpu(program: str, folder: Path, archs: tuple[str, ...]) -> Path:
    """The program compiled by nvcc for these architectures, such as 80 and 90a."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not on the PATH")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    # and PTX for newer GPUs, which sm_90a has none of
    codes += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in archs if not a.endswith("a")]
    path = folder / program
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda' / 'device' / 'nvidia'}"]
    _run("nvcc", *codes, "-std=c++20", "-O2", *includes, SOURCES / f"{program}.cu", "-o", path)
    return path
