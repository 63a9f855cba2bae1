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
    registers: int  # of a thread
    stack: int  # bytes of local memory per thread: what was spilled


class _Driver:
    """What the compiler asks a driver for."""

    def __init__(self, chip: int | str) -> None:
        from triton.backends.compiler import GPUTarget

        if isinstance(chip, int):
            self.target = GPUTarget("cuda", chip, 32)
        else:
            self.target = GPUTarget("hip", chip, 64 if _cdna(chip) else 32)

    def get_current_device(self) -> Any:
        return self.target.arch  # compiled kernels are remembered by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _cdna(chip: str) -> bool:
    return chip.startswith("gfx9")


@contextlib.contextmanager
def compiling(chip: int | str, cache: Path) -> Iterator[list[Compiled]]:
    """Inside, calls on CPU tensors with backend="triton" compile for `chip` (80, 90, "gfx942", ...) and leave their outputs unwritten."""
    import triton
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    import foveate.backend.triton as backend
    from foveate.backend import registry
    from foveate.backend.triton import attention_launch, config

    arch = chip if isinstance(chip, int) else config.CDNA if _cdna(chip) else config.RDNA
    found: list[Compiled] = []
    active = driver._active
    run, interpreted, arch_of = JITFunction.run, backend.interpreted, attention_launch.arch

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        asm = kernel.asm
        resources = _resources(asm["cubin"], cache) if "cubin" in asm else _amd_resources(asm["amdgcn"])
        found.append(Compiled(kernel.metadata.name, kernel.metadata.shared, *resources))

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(cache)
        driver.set_active(_Driver(chip))
        JITFunction.run, backend.interpreted, attention_launch.arch = compile_only, lambda: True, lambda device: arch
        registry.forget_choices()
        try:
            yield found
        finally:
            JITFunction.run, backend.interpreted, attention_launch.arch = run, interpreted, arch_of
            registry.forget_choices()
            driver._active = active


def _resources(cubin: bytes, folder: Path) -> tuple[int, int]:
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    listing = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", listing).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def _amd_resources(assembly: str) -> tuple[int, int]:
    registers, stack = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))  # type: ignore[union-attr]
        for name in ("vgpr_count", "private_segment_fixed_size")
    )
    return registers, stack
