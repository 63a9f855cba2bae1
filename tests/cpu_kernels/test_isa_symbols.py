"""No function compiled for one instruction set may be what the linker picks for all.

A template or inline function is a weak symbol: of several copies the linker keeps one. If a kernel's object file brought a weak
copy of a shared function (std::sort, foveate::fail), compiled for AVX-512, an older CPU could run it and die. So weak symbols of
those object files must lie in the namespace of their instruction set.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "build"
# Debug and unwinding data, not code.
DATA = re.compile(r"DW\.ref\.|typeinfo|vtable")


def objects() -> list[Path]:
    return [p for p in BUILD.glob("*/CMakeFiles/cpu_*.dir/**/*.o") if "sanitize" not in p.parts]


@pytest.mark.skipif(not objects(), reason="no object files in build/: the package was not built in this checkout")
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_weak_symbols_belong_to_their_instruction_set():
    shared = []
    for path in objects():
        isa = re.search(r"cpu_(\w+)\.dir", str(path))[1]
        for line in subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout.splitlines():
            symbol = re.match(r"[0-9a-f]* *[WVu] (.*)", line.strip())
            if symbol and f"foveate::cpu::{isa}::" not in symbol[1] and not DATA.search(symbol[1]):
                shared.append(f"{path.name} ({isa}): {symbol[1]}")
    assert not shared, "shared weak functions compiled for one instruction set:\n" + "\n".join(shared)
