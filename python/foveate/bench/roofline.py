"""The limits that a kernel can reach on this machine, measured in the same run as the kernels. CPU only.

multiply_add  independent chains on registers, fp32, and bf16 by the dot instruction or AMX where the CPU target has one
read, copy    a buffer eight times as large as the last-level cache: sum of it; copy with stores past the caches, read + written bytes
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.backend import native

_CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")


class Limits(NamedTuple):
    """GFLOP/s and GB/s on `threads` threads. bf16_gflops is fp32's where bf16 has no instruction of its own."""

    threads: int
    fp32_gflops: float
    bf16_gflops: float
    read_gbs: float
    copy_gbs: float


def last_cache_bytes() -> int:
    """Size of the largest cache of the first CPU core, as the kernel tells it; 32 MiB where it does not."""
    sizes = [path.read_text().strip() for path in _CACHE_FOLDER.glob("index*/size")]
    unit = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * unit[s[-1]] for s in sizes if s[-1:] in unit), default=32 << 20)


def measure(quick: bool = False) -> Limits:
    """Best of several samples each: a limit is a maximum. `quick` takes smaller buffers and fewer samples."""
    C = native._C
    if C is None:
        raise RuntimeError(f"the limits are measured by compiled loops: {native.missing_reason}")
    threads = torch.get_num_threads()
    sums = torch.zeros(threads)
    samples = 3 if quick else 15

    def gflops(dtype: str) -> float:
        flops = C.multiply_add(sums, dtype, 1, threads)
        if flops == 0:
            return 0.0
        steps = 1_000_000 if quick else 10_000_000  # of ten or twenty cycles each
        seconds = _best(lambda: C.multiply_add(sums, dtype, steps, threads), samples)
        return flops * steps / seconds / 1e9

    x = torch.ones((8 << 20) if quick else 2 * last_cache_bytes())  # 4-byte elements
    out = torch.zeros_like(x)
    fp32 = gflops("float32")
    return Limits(
        threads=threads,
        fp32_gflops=fp32,
        bf16_gflops=gflops("bfloat16") or fp32,
        read_gbs=_bytes(x) / _best(lambda: C.read_memory(x, sums, threads), samples) / 1e9,
        copy_gbs=2 * _bytes(x) / _best(lambda: C.copy_memory(x, out, threads), samples) / 1e9,
    )


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _best(function: Callable[[], object], samples: int) -> float:
    """Seconds of the fastest call, after one that is not counted."""
    fastest = float("inf")
    function()
    for _ in range(samples):
        start = time.perf_counter()
        function()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest
