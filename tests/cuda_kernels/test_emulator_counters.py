"""The emulator's counters: passes over the banks of shared memory and sectors of global memory, by rules
(docs/kernels/emulator.md) whose results for simple patterns are known (tests/native/device/counters.cu)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from device_programs import SOURCES, emulated

WARPS = 4  # two blocks of two

# Requests of a warp, their cost, and the least that any addresses would cost.
SHARED = {
    "words in a row": (1, 1, 1),
    "every second word": (1, 2, 1),
    "one bank": (1, 32, 1),
    "halves of words": (1, 1, 1),
    "8 bytes in a row": (1, 2, 2),
    "16 bytes in a row": (1, 4, 4),
    "16 bytes of every 32": (1, 8, 4),
    "fragments in rows of 128 bytes": (1, 8, 2),
    "fragments in rows of 160 bytes": (1, 2, 2),
    "one word for all": (1, 1, 1),
    "16 bytes for all": (1, 4, 4),
    "a loop with a rest": (2, 2, 2),
    "some lanes": (1, 1, 1),
    "matrix rows of 128 bytes": (4, 32, 4),
    "matrix rows of 144 bytes": (4, 4, 4),
    "matrix rows of 64 bytes": (2, 8, 2),
    "transposed, 144 bytes": (4, 4, 4),
    "atomics in a row": (1, 1, 1),
    "atomics to one word": (1, 32, 1),
    "copies in a row": (1, 4, 4),
    "copies of zeros": (1, 4, 4),
    "copies to one bank": (1, 16, 1),
}
GLOBAL = {
    "copies in a row": (1, 16, 16),
    "copies to one bank": (1, 2, 2),
    "global words in a row": (1, 4, 4),
    "every second global word": (1, 8, 4),
    "global words from byte 4": (1, 5, 4),
    "one global word for all": (1, 1, 1),
    "16 global bytes in a row": (1, 16, 16),
    "16 of every 32 global bytes": (1, 32, 16),
    "a global word of every 64 bytes": (1, 32, 4),
    "global halves of words": (1, 2, 2),
    "global atomics in a row": (1, 4, 4),
}


@pytest.fixture(scope="module", params=["round-robin", "random", "priority"])
def launches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("counters") / "counters.jsonl"
    variables = {"FOVEATE_EMULATOR_COUNTERS": str(path), "FOVEATE_EMULATOR_SCHEDULE": request.param}
    # The patterns care for costs, not for order.
    done = subprocess.run(
        [emulated("counters")],
        capture_output=True,
        text=True,
        env={**os.environ, **variables, "FOVEATE_EMULATOR_RACE": "0"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in path.read_text().splitlines()]


def counted(launches: list[dict[str, Any]], memory: str) -> dict[str, tuple[int, int, int]]:
    lines = (SOURCES / "counters.cu").read_text().splitlines()
    named = {}
    for access in launches[0]["accesses"]:
        if access["memory"] == memory:
            file, line = access["at"].split(":")
            assert file == "counters.cu"
            numbers = tuple(access[name] / WARPS for name in ("requests", "cost", "least"))
            named[lines[int(line) - 1].rsplit("// ", 1)[1]] = numbers
    return named


def test_a_launch_is_a_line_with_its_kernel(launches: list[dict[str, Any]]) -> None:
    assert [(x["kernel"], x["blocks"], x["threads"]) for x in launches] == [("patterns", 2, 64)]


def test_passes_over_banks(launches: list[dict[str, Any]]) -> None:
    assert counted(launches, "shared") == SHARED


def test_sectors(launches: list[dict[str, Any]]) -> None:
    assert counted(launches, "global") == GLOBAL


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    done = subprocess.run(
        [emulated("counters")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "FOVEATE_EMULATOR_COUNTERS": str(tmp_path / "no folder" / "x"),
            "FOVEATE_EMULATOR_RACE": "0",
        },
    )
    assert done.returncode == 1
    assert "FOVEATE_EMULATOR_COUNTERS: cannot write to" in done.stderr
