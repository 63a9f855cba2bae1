"""python/foveate/_C.pyi is what pybind11-stubgen says of the compiled module."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / ".ci" / "stubs.py"


def test_stub_describes_the_compiled_module() -> None:
    spec = importlib.util.spec_from_file_location("stubs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    stubs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stubs)
    assert stubs.generate() == stubs.STUB.read_text(), "run `make stubs`"
