"""python/foveate/_C.pyi is what pybind11-stubgen says of the compiled module."""

from __future__ import annotations

import stubs


def test_stub_describes_the_compiled_module() -> None:
    assert stubs.generate() == stubs.STUB.read_text(), "run `make stubs`"
