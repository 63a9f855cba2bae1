"""What nvcc makes of our kernels, on the PTX machine: every entry of the package decodes, the device layer's inline PTX gives its golden
vectors, and bugs planted in sources and in PTX text are caught. The package's own tests run on the machine in CI (.ci/run)."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ptx_programs import compile_ptx, kernels

from device_programs import GOLDEN, SOURCES, WIDENED, check_widening, emulated


def test_every_entry_of_the_package_decodes(machine: Path) -> None:
    files = kernels()
    done = subprocess.run([str(machine), "decode", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = dict(line.split() for line in done.stdout.splitlines())
    in_text = sum(len(re.findall(r"^(?:\.visible )?\.entry ", file.read_text(), re.MULTILINE)) for file in files)
    assert int(counts.pop("entries")) == in_text > 200
    assert len(counts) > 100  # spellings; the table names each
    assert int(counts["mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"]) > 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The PTX of tests/native/device/, a folder for each program."""
    top = tmp_path_factory.mktemp("ptx")
    for program in ("conformance", "seeded_bugs", "seeded_bugs_stages", "seeded_bugs_global"):
        (top / program).mkdir()
        compile_ptx(SOURCES / f"{program}.cu", top / program / f"{program}.ptx")
    return top


def run(program: str, ptx: Path, argument: str, words: bytes = b"") -> bytes:
    environment = {**os.environ, "FOVEATE_EMULATOR_PTX": str(ptx)}
    done = subprocess.run([str(emulated(program)), argument], input=words, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


Conformance = Callable[[str, np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def conformance(folder: Path) -> Conformance:
    return lambda case, words: np.frombuffer(
        run("conformance", folder / "conformance", case, words.astype(np.uint32).tobytes()), np.uint32
    )


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors_of_the_device_layer(conformance: Conformance, case: str) -> None:
    assert conformance(case, np.array(GOLDEN[case]["in"])).tolist() == GOLDEN[case]["out"]


@pytest.mark.parametrize("name", WIDENED)
def test_widening_every_code(conformance: Conformance, name: str) -> None:
    check_widening(conformance, name)


# What the machine reports of the bugs of tests/native/device, compiled by nvcc; several where the schedule decides which comes first.
RACE = "race on byte .* of shared memory"
UNDER_WAY = "under way: it has not been waited for"
RACE_OF = "race on byte .* of {} in global memory"
CAUGHT = {
    "seeded_bugs": {
        "NoBarrierBeforeReuse": f"{RACE}|{UNDER_WAY}",
        "NoBarrierAfterWait": f"{RACE}|{UNDER_WAY}",
        "WaitTooLax": UNDER_WAY,
        "WrongSwizzleOfV": "wrong: element",
        "RowNeverLoaded": "wrong: element .* off by -?nan",
        "RowOutOfBounds": "cp.async.* of 16 bytes at seeded_bugs.cu:.* outside every tensor; the nearest is [kvq]|cp_async of 16 bytes",
        "StoreOutOfBounds": "st.global.* of 16 bytes at .* outside every tensor; the nearest is out",
        "DivergentShuffle": "divergence: lane",
        "WarpSkipsBarrier": f"{RACE}|{UNDER_WAY}|deadlock",
        "NoSyncWarp": f"{RACE}.*no sync_warp",
        "CopyNeverWaitedFor": "returns with an asynchronous copy under way",
        "ThirdStage": "outside the block's 40960 bytes of shared memory",
        "Misaligned": "ld.shared.* of 16 bytes at .* is not a multiple of 16",
        "NoBase": r"smem_base\(\) \+ -\d+, is outside",
        "LaneReturnsEarly": "divergence|has returned",
        "SpinsForever": "an endless loop",
        "BarrierCountsDiffer": "barrier 1 is for (64|128) threads here, and for (64|128)|deadlock: .*barrier 1 has 64 threads of 128",
        "ReadWhileWriting": f"{RACE}.*no barrier",
        "MissingArrival": "deadlock: .*barrier 1 has 64 threads of 96",
    },
    "seeded_bugs_stages": {
        "NoSyncWarpBeforeReuse": f"{RACE}.*no sync_warp|{UNDER_WAY}",
        "NoSyncWarpAfterWait": f"{RACE}.*no sync_warp|{UNDER_WAY}",
        "NoWait": UNDER_WAY,
        "WaitTooLax": UNDER_WAY,
        "ThreeStagesOfTwo": UNDER_WAY,
        "WarpInBranch": "divergence",
    },
    "seeded_bugs_global": {
        "NoFence": RACE_OF.format("parts"),
        "FenceTooEarly": RACE_OF.format("parts"),
        "NoBarrierBefore": RACE_OF.format("parts"),
        "NoBarrierAfter": RACE_OF.format("parts"),
        "NotCounted": RACE_OF.format("parts"),
        "CounterNotReset": "counter of atomic_add_acq_rel at .* is left at 4 by the launch that found it at 0",
        "ResetTooEarly": RACE_OF.format("counters"),
        "ReadOnlyPath": "of parts, which this launch has written by block 0 .*the read-only path",
        "PlainAddition": RACE_OF.format("total"),
        "SameAddress": RACE_OF.format("total"),
        "ReadBeforeWrite": RACE_OF.format("parts"),
        "NoFenceInTurn": RACE_OF.format("in_turn"),
        "NoAcquire": RACE_OF.format("turn"),
        "TurnNotAwaited": RACE_OF.format("in_turn"),
        "NoBarrierInBlock": RACE_OF.format("parts"),
    },
}  # fmt: skip
SECOND = {"seeded_bugs": ["200"], "seeded_bugs_stages": ["0"], "seeded_bugs_global": []}


def reports(program: str, ptx: Path, bug: int) -> list[str]:
    environment = {**os.environ, "FOVEATE_EMULATOR_PTX": str(ptx)}
    command = [str(emulated(program)), str(bug), *SECOND[program]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [line.split(": ", 1)[1] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("program", CAUGHT)
def test_the_right_kernels_raise_no_alarm(folder: Path, program: str) -> None:
    assert set(reports(program, folder / program, 0)) == {"ok"}


@pytest.mark.parametrize("program, bug", [(program, bug) for program, bugs in CAUGHT.items() for bug in bugs])
def test_a_bug_compiled_by_nvcc_is_caught_on_every_schedule(folder: Path, program: str, bug: str) -> None:
    for report in reports(program, folder / program, 1 + list(CAUGHT[program]).index(bug)):
        assert re.search(CAUGHT[program][bug], report), report


# ---- bugs in PTX text: the right kernel's, with one line changed --------------------------------------------------------------


def right_kernel(folder: Path) -> tuple[list[str], int, int]:
    """The lines of seeded_bugs.ptx, and between which of them the kernel without a bug stands."""
    lines = (folder / "seeded_bugs" / "seeded_bugs.ptx").read_text().splitlines(keepends=True)
    start = next(k for k, line in enumerate(lines) if ".entry" in line and "Li0E" in line)
    end = next(k for k in range(start, len(lines)) if lines[k].startswith("}"))
    return lines, start, end


def changed(folder: Path, to: Path, pattern: str, by: Callable[[str], str], every: int = 1) -> list[list[str]]:
    """For each line (each 2nd, ...) of the right kernel that matches: what every schedule reports when that line alone is changed."""
    lines, start, end = right_kernel(folder)
    found = []
    for k in [k for k in range(start, end) if re.search(pattern, lines[k])][::every]:
        (to / "seeded_bugs.ptx").write_text("".join([*lines[:k], by(lines[k]), *lines[k + 1 :]]))
        found.append(reports("seeded_bugs", to, 0))
    assert found
    return found


def test_a_barrier_taken_out_of_the_text_is_caught(folder: Path, tmp_path: Path) -> None:
    for told in changed(folder, tmp_path, r"bar\.sync", lambda line: "\n"):
        assert all(re.search(f"{RACE}|{UNDER_WAY}", report) for report in told), told


def test_a_wait_taken_out_of_the_text_is_caught(folder: Path, tmp_path: Path) -> None:
    for told in changed(folder, tmp_path, r"cp\.async\.wait", lambda line: "\n"):
        assert all(re.search(UNDER_WAY, report) for report in told), told


def test_a_changed_predicate_is_caught(folder: Path, tmp_path: Path) -> None:
    """Where rows end: `setp.lt` that chooses between a copy of 16 bytes and zeros, turned around. Rests of unrolled loops never run."""
    told = changed(folder, tmp_path, r"selp\.b32 .*, 16, 0, %p", lambda line: line.replace("16, 0,", "0, 16,"), every=3)
    caught = [reports for reports in told if "ok" not in reports]
    assert all(reports == ["ok"] * len(reports) or "ok" not in reports for reports in told)
    assert len(caught) >= len(told) // 2 >= 2
