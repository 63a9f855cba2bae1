"""The AMX tiles that tests simulate (csrc/cpu/amx/tiles_shim.h) are the CPU's, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="AMX belongs to x86-64")
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
def test_simulated_tiles_equal_the_instructions(tmp_path: Path) -> None:
    program = tmp_path / "tiles_check"
    source = ROOT / "tests" / "native" / "tiles_check.cpp"
    flags = ["-std=c++20", "-O2", "-Wno-psabi", f"-I{ROOT / 'csrc'}"]
    built = subprocess.run([COMPILER, *flags, source, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("this CPU or system has no AMX")
    assert done.returncode == 0 and "0 differ" in done.stdout, done.stdout
