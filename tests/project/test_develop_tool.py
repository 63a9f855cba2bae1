"""tools/develop.py: what it chooses to compile, and what it shows of ninja's steps."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

import develop


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(develop, "LOG", tmp_path / "build" / "build.log")
    monkeypatch.setattr(develop, "PLAIN_SECONDS", 0)
    return develop.LOG


def shown(*lines: str, code: int = 0) -> str:
    """What a command that says these lines looks like where the output is a file."""
    out = io.StringIO()
    script = f"import sys; print({chr(10).join(lines)!r}); sys.exit({code})"
    develop.run([sys.executable, "-c", script], dict(os.environ), develop.Progress(out))
    return out.getvalue()


def test_steps_have_a_count_and_the_time_left(log: Path) -> None:
    text = shown(
        "  -- foveate: CPU kernels for avx2 (FOVEATE_CPU_TARGETS=native)",
        "  [0/2 ?] Re-checking globbed directories...",
        "  [1/45 01:10] Building CXX object CMakeFiles/cpu_avx2.dir/csrc/cpu/linear/linear.cpp.o",
        "  [2/45 1:02:05] Building CUDA object CMakeFiles/_C.dir/csrc/cuda/rows/softmax.cu.o",
        "  [3/45 ?] Building CXX object CMakeFiles/_C.dir/csrc/ops/norm.cpp.o",
        "  [45/45 00:00] Linking CXX shared module _C.so",
    )
    lines = text.splitlines()
    assert lines[0] == "foveate: CPU kernels for avx2 (FOVEATE_CPU_TARGETS=native)"
    assert lines[1] == "[1/45] csrc/cpu/linear/linear.cpp for avx2, 0:00, about 1:10 left"
    assert lines[2] == "[2/45] csrc/cuda/rows/softmax.cu, 0:00, about 62:05 left"
    assert lines[3] == "[3/45] csrc/ops/norm.cpp, 0:00"
    assert lines[4].startswith("[45/45] Linking _C.so, 0:00") and len(lines) == 5
    assert "Re-checking" not in text and "Re-checking" in log.read_text()


def test_a_failure_shows_what_the_compiler_said(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"The build failed after 0:00; .*build.log has the whole output"):
        shown("before", "FAILED: CMakeFiles/x.o", "x.cpp:3:1: error: no such thing", code=1)
    said = capsys.readouterr().err
    assert said.startswith("FAILED: CMakeFiles/x.o") and "no such thing" in said


@pytest.mark.parametrize("driver", [False, True])
def test_a_machine_compiles_what_it_can_run(driver: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(develop, "has_driver", lambda: driver)
    for name in ("FOVEATE_CPU_TARGETS", "FOVEATE_CUDA"):
        monkeypatch.delenv(name, raising=False)
    everything = {"FOVEATE_CPU_TARGETS": "all", "FOVEATE_CUDA": "AUTO"}
    here = {"FOVEATE_CPU_TARGETS": "native", "FOVEATE_CUDA": "AUTO" if driver else "OFF"}
    assert develop.choices(False) == everything and develop.choices(True) == here
    assert develop.covers(everything, here) and develop.covers(here, here) and not develop.covers(here, everything)
    monkeypatch.setenv("FOVEATE_CPU_TARGETS", "avx2")
    assert develop.choices(True) == here | {"FOVEATE_CPU_TARGETS": "avx2"}
    assert not develop.covers(everything, develop.choices(True))
