"""Includes of csrc/ run downward: core <- contract <- cpu, cuda <- ops <- decoder <- bindings, and no folder names the emulator."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
# What the files of each folder may include, besides their own folder and the system's headers.
MAY_INCLUDE = {
    "core": set(),
    "contract": {"core"},
    "cpu": {"core", "contract"},
    "cuda": {"core", "contract"},
    "ops": {"core", "contract", "cpu", "cuda"},
    "decoder": {"core", "contract", "cpu", "ops"},
    "bench": {"core", "contract", "cpu"},
    "bindings": {"core", "contract", "cpu", "cuda", "ops", "decoder", "bench"},
    "emulator": {"core", "cuda"},
}
# Found by the include path: in cuda/device/nvidia/, or in emulator/device/ for a build without a GPU.
BY_INCLUDE_PATH = {path.name for path in (CSRC / "emulator" / "device").iterdir()}
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def upward(csrc: Path) -> list[str]:
    """A sentence for each include that MAY_INCLUDE does not allow."""
    sentences = []
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".h", ".cuh", ".cpp", ".cu"}):
        source = path.relative_to(csrc)
        layer = source.parts[0]
        for name in INCLUDE.findall(path.read_text()):
            target = name.split("/")[0]
            if "/" not in name and ((path.parent / name).exists() or name in BY_INCLUDE_PATH):
                continue
            if target != layer and target not in MAY_INCLUDE[layer]:
                allowed = ", ".join(sorted(MAY_INCLUDE[layer])) or "nothing but itself"
                sentences.append(f"{source} includes {name}; {layer}/ may include {allowed}")
    return sentences


def test_includes_run_downward() -> None:
    assert {path.name for path in CSRC.iterdir() if path.is_dir()} == set(MAY_INCLUDE)
    assert len(list(CSRC.rglob("*.h"))) > 50
    assert upward(CSRC) == []


def test_both_implementations_of_the_device_layer_have_the_same_files() -> None:
    of_nvidia = {path.name for path in (CSRC / "cuda" / "device" / "nvidia").iterdir()}
    assert of_nvidia >= BY_INCLUDE_PATH
    assert of_nvidia - BY_INCLUDE_PATH == {"wgmma_impl.cuh"}  # which hopper_impl.cuh includes


def test_an_upward_include_is_found(tmp_path: Path) -> None:
    for name, text in {
        "contract/a.h": '#include "core/tensor.h"\n#include "cpu/simd/vec.h"\n',
        "cuda/rows/b.cu": '#include <cstdint>\n#  include "emulator/checks/race.h"\n#include "cuda/host/launch.h"\n',
        "cpu/simd/c.h": '#include "cuda/host/stream.h"\n#include "d.h"\n',
        "cpu/simd/d.h": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(tmp_path) == [
        "contract/a.h includes cpu/simd/vec.h; contract/ may include core",
        "cpu/simd/c.h includes cuda/host/stream.h; cpu/ may include contract, core",
        "cuda/rows/b.cu includes emulator/checks/race.h; cuda/ may include contract, core",
    ]
