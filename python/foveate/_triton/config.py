"""Block sizes, warps and stages of the kernels: pure functions of shapes, dtype and chip, nothing is measured at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .tiles import parts

PLAIN, DESCRIPTORS, SPECIALIZED = range(3)  # kernels of the forward pass; the last two are for sm_90


class Config(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    warps: int
    stages: int
    variant: int = PLAIN


def _rows(wanted: int, longest: int) -> int:
    """A power of two from 16 to longest that holds `wanted` rows."""
    return min(longest, max(16, 1 << (wanted - 1).bit_length()))


@functools.lru_cache(maxsize=4096)
def forward(D: int, Dv: int, dtype: torch.dtype, rows: int, arch: int) -> Config:
    """rows: query rows that one program could take. arch: 80, 90, 100, ... (0 for the interpreter).

    Half precision: 128 queries, and as many keys as leave two or three stages in the shared memory of the chip (163 KiB on sm_80, 227
    on sm_90 and sm_100). fp32 has no tensor cores without tf32: smaller tiles keep its operands in registers.
    """
    width = max(sum(parts(D)), sum(parts(Dv)))
    roomy = arch >= 90
    if dtype == torch.float32:
        config = Config(64, 32, 8, 2) if width <= 64 else Config(64, 16, 8, 2) if width <= 128 else Config(32, 16, 8, 2)
    elif (width <= 128 and arch >= 100) or width < 64:
        config = Config(128, 64, 8, 3)
    elif width <= 64:
        config = Config(128, 128, 8, 3) if roomy else Config(128, 64, 4, 3)
    elif width <= 128:
        config = Config(128, 128, 8, 2) if roomy else Config(128, 64, 8, 2)
    elif arch >= 100:
        config = Config(128, 32, 8, 2)
    else:
        config = Config(128, 64, 8, 2) if roomy else Config(64, 64, 8, 2)
    block_m = _rows(rows, config.block_m)
    return config if block_m == config.block_m else Config(block_m, min(64, config.block_n), 4, 2)


@functools.lru_cache(maxsize=4096)
def packs(Sq: int, share: int, block_m: int) -> bool:
    """Whether the query heads that share a KV head become rows of one program: where that makes clearly fewer blocks."""
    if share == 1:
        return False
    return 10 * -(-Sq * share // block_m) < 9 * share * -(-Sq // block_m)


@functools.lru_cache(maxsize=4096)
def backward(D: int, Dv: int, dtype: torch.dtype, arch: int) -> tuple[Config, Config]:
    """Of the kernel for dq, where the queries stay and the keys pass, and of the one for dk and dv, where it is the other way round."""
    width = max(sum(parts(D)), sum(parts(Dv)))
    if dtype == torch.float32:
        if width <= 64:
            return Config(32, 32, 4, 1), Config(32, 32, 4, 1)
        return (
            (Config(32, 16, 8, 1), Config(16, 32, 8, 1))
            if width <= 128
            else (Config(16, 16, 4, 1), Config(16, 16, 8, 1))
        )
    if width <= 64:
        return Config(128, 64, 8, 2), Config(32, 64, 8, 2) if arch >= 90 else Config(32, 128, 8, 2)
    if width <= 128:
        return (
            (Config(128, 64, 8, 2), Config(32, 64, 8, 2))
            if arch >= 90
            else (Config(64, 64, 8, 2), Config(64, 64, 8, 1))
        )
    return Config(32, 32, 4, 1), Config(16, 32, 4, 1)
