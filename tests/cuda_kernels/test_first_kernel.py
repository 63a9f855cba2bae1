"""The tutorial docs/kernels/first_kernel.md: its code is that of tests/native/device/first_kernel.cu, and does what the page says."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from device_programs import ROOT, SOURCES, emulated

PAGE = (ROOT / "docs" / "kernels" / "first_kernel.md").read_text()
SCHEDULES = ("round-robin", "random", "priority")


def run(which: str, **environment: str) -> str:
    done = subprocess.run(
        [emulated("first_kernel"), which], env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return done.stdout.strip()


def error_of(printed: str) -> float:
    return float(printed.removeprefix("largest error "))


def test_code_of_the_page_is_the_code_that_runs() -> None:
    source = (SOURCES / "first_kernel.cu").read_text()
    blocks = re.findall(r"^```cuda\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        assert block.strip() in source, block


@pytest.mark.parametrize("which", ["warp", "block"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_right_kernels_are_right(which: str, schedule: str) -> None:
    assert error_of(run(which, FOVEATE_EMULATOR_SCHEDULE=schedule)) < 1e-8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_missing_barrier_is_caught(schedule: str) -> None:
    report = run("no-barrier", FOVEATE_EMULATOR_SCHEDULE=schedule)
    assert re.search(
        r"race on byte \d+ of shared memory: write by warp .* first_kernel.cu:\d+, and read by warp", report
    )


def test_without_the_detector_it_is_caught_by_luck() -> None:
    """What the page says of the result: right in the order of the warps, wrong in a drawn one."""
    blind = {"FOVEATE_EMULATOR_RACE": "0"}
    assert error_of(run("no-barrier", FOVEATE_EMULATOR_SCHEDULE="round-robin", **blind)) < 1e-8
    assert error_of(run("no-barrier", FOVEATE_EMULATOR_SCHEDULE="random", **blind)) > 1e-4


def test_reports_of_the_page_are_those_of_the_emulator() -> None:
    for line in re.findall(r"^block \(0, 0, 0\), thread .*$", PAGE, re.MULTILINE):
        assert line == run("no-barrier", FOVEATE_EMULATOR_SCHEDULE="random")
