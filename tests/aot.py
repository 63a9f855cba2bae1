"""Compiles the Triton kernels of a call for a chip that is not there: each launch becomes a compilation."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Compiled(NamedTuple):
    name: str
    shared: int  # bytes
    registers: int
    stack: int  # bytes of local memory per thread: what was spilled


class _Driver:
    """What the compiler asks a driver for."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling(arch: int, cache: Path) -> Iterator[list[Compiled]]:
    """Inside, calls on CPU tensors with backend="triton" compile for `arch` (80, 90, 100) and leave their outputs unwritten."""
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    import foveate._triton as backend
    from foveate import _backends
    from foveate._triton import attention

    found: list[Compiled] = []
    active = driver._active
    run, interpreted, chip = JITFunction.run, backend.interpreted, attention.arch

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.append(Compiled(kernel.metadata.name, kernel.metadata.shared, *_resources(kernel.asm["cubin"], cache)))

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache)
        driver.set_active(_Driver(arch))
        JITFunction.run, backend.interpreted, attention.arch = compile_only, lambda: True, lambda device: arch
        _backends.choose.cache_clear()
        try:
            yield found
        finally:
            JITFunction.run, backend.interpreted, attention.arch = run, interpreted, chip
            _backends.choose.cache_clear()
            driver._active = active


def _resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    listing = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", listing).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)
