"""The emulator finds mistakes in kernels: a small flash attention with one bug each (tests/native/device/seeded_bugs.cu)."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from device_programs import SOURCES, emulated

RUNS = 11  # round-robin, and five seeds each of random and priority

# What the report says; several where the schedule decides which of a bug's consequences comes first.
CAUGHT_BY = {
    "NoBarrierBeforeReuse": ["race on byte .*write.*read.*no barrier", "read .* under way"],
    "NoBarrierAfterWait": ["race on byte", "under way: it has not been waited for"],
    "WaitTooLax": ["under way: it has not been waited for"],
    "WrongSwizzleOfV": ["wrong: element"],
    "RowNeverLoaded": ["wrong: element .* off by -?nan"],
    "RowOutOfBounds": ["cp_async of 16 bytes at seeded_bugs.cu:.* outside every tensor; the nearest is [kvq]"],
    "StoreOutOfBounds": ["st_global of 16 bytes at .* outside every tensor; the nearest is out"],
    "DivergentShuffle": [r"divergence in warp \d: lane \d+ comes to .* while lane \d+ waits in"],
    "WarpSkipsBarrier": ["race on byte", "under way: it has not been waited for"],
    "NoSyncWarp": ["race on byte .*write by warp (.) lane .*no sync_warp"],
    "CopyNeverWaitedFor": ["returns from the kernel with an asynchronous copy under way"],
    "ThirdStage": ["outside the block's 40960 bytes of shared memory"],
    "Misaligned": ["ld_shared of 16 bytes at .* is not a multiple of 16"],
    "NoBase": [r"smem_base\(\) \+ -\d+, is outside"],
    "LaneReturnsEarly": ["divergence in warp .*lane 7 has returned", "returns from the kernel, but other lanes"],
    "SpinsForever": ["spin_pause at .* waits for something that no thread does"],
    "BarrierCountsDiffer": [
        "barrier 1 is for (64|128) threads here, and for (64|128) where others came to it",
        "deadlock: .*barrier 1 has 64 threads of 128",
    ],
    "ReadWhileWriting": ["race on byte .*no barrier"],
    "MissingArrival": [
        "deadlock: warp 0-1 waits in named_barrier_sync at .*; warp 2-3 waits in sync_threads .*barrier 1 has 64 threads of 96"
    ],
}


@pytest.fixture(scope="module")
def program() -> Path:
    return emulated("seeded_bugs")


def run(program: Path, bug: int, size: int, **environment: str) -> list[str]:
    variables = {**os.environ, **environment}
    done = subprocess.run([program, str(bug), str(size)], capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stderr
    return [line.split(": ", 1)[1] for line in done.stdout.splitlines()]


def test_every_bug_is_listed() -> None:
    names = re.search(r"enum Bug \{(.*?)\}", (SOURCES / "seeded_bugs.cu").read_text(), re.DOTALL)[1]
    assert re.findall(r"^\s*k(\w+),", names, re.MULTILINE) == ["None", *CAUGHT_BY]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [1, 64, 200])
def test_the_right_kernel_raises_no_alarm(program: Path, size: int, threads: int) -> None:
    assert run(program, 0, size, FOVEATE_EMULATOR_THREADS=str(threads)) == ["ok"] * RUNS


@pytest.mark.parametrize("bug", CAUGHT_BY)
def test_bug_is_caught_on_every_schedule(program: Path, bug: str) -> None:
    reports = run(program, 1 + list(CAUGHT_BY).index(bug), 200)
    assert len(reports) == RUNS
    for report in reports:
        assert any(re.search(pattern, report) for pattern in CAUGHT_BY[bug]), report


def test_a_race_is_seen_by_the_detector_only(program: Path) -> None:
    """Round-robin never shows this one: without the detector the result is right. So the detector does not depend on the schedule."""
    reports = run(program, 1, 200, FOVEATE_EMULATOR_RACE="0")
    assert reports[0] == "ok"


def test_unknown_settings_are_refused(program: Path) -> None:
    assert (
        "FOVEATE_EMULATOR_RACE is '2', expected a whole number from 0 to 1"
        in run(program, 0, 1, FOVEATE_EMULATOR_RACE="2")[0]
    )
    assert "FOVEATE_EMULATOR_THREADS is 'x'" in run(program, 0, 1, FOVEATE_EMULATOR_THREADS="x")[0]
