"""Block sizes, warps and stages of the kernels: pure functions of shapes, dtype, chip and `configs.json`; nothing is measured at run time.

`foveate bench tune` measures on the GPU that is there and writes what is faster than the rules below into `configs.json`.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .tiles import parts

PLAIN, DESCRIPTORS, SPECIALIZED = range(3)  # kernels of the forward pass; the last two are for sm_90
TABLE_PATH = Path(__file__).with_name("configs.json")
LONG = 2048  # queries from which on a call counts as long


# What `arch` is where the chip is none of NVIDIA's, whose numbers are 80, 86, 90, ...: the interpreter; AMD's chips with matrix cores for
# data centres (gfx9, 64 threads in a wave) and the others (gfx10 and later, 32 threads); Intel's.
INTERPRETER, CDNA, RDNA, XE = range(4)


class Config(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    warps: int
    stages: int
    variant: int = PLAIN


def chip(arch: int) -> str:
    """The chip's name in the table."""
    return f"sm_{arch}" if arch > XE else ("interpreter", "cdna", "rdna", "xe")[arch]


def shared_memory(arch: int) -> int:
    """Bytes of it that one block of threads may have."""
    if arch in (CDNA, RDNA):
        return 64 << 10
    if arch == XE:
        return 128 << 10
    if arch in (86, 89) or arch >= 120:
        return 99 << 10
    return 227 << 10 if arch >= 90 else 163 << 10


def family(arch: int) -> str:
    """The chips that share a column of the rules: by shared memory, and by the instruction that multiplies matrices."""
    if arch in (CDNA, RDNA):
        return chip(arch)
    if shared_memory(arch) < 160 << 10:
        return "sm_86"
    return "sm_80" if arch < 90 else "sm_90" if arch < 100 else "sm_100"


def key(kind: str, width: int, dtype: torch.dtype, queries: int, arch: int) -> str:
    """The place in the table: kind is "forward", "forward masked" (causal or windowed), "dq" or "dkv"; width the padded head dim."""
    return f"{chip(arch)} {kind} {width} {'fp32' if dtype == torch.float32 else 'half'} {'long' if queries >= LONG else 'short'}"


def read_table(path: Path = TABLE_PATH) -> dict[str, Config]:
    return {name: Config(*entry) for name, entry in json.loads(path.read_text()).items()}


def write_table(table: Mapping[str, Config], path: Path = TABLE_PATH) -> None:
    lines = [f"  {json.dumps(name)}: {json.dumps(list(table[name]))}" for name in sorted(table)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n" if lines else "{}\n")


_table: Mapping[str, Config] | None = None


def _entry(kind: str, width: int, dtype: torch.dtype, queries: int, arch: int) -> Config | None:
    global _table
    if _table is None:
        _table = read_table()
    return _table.get(key(kind, width, dtype, queries, arch))


@contextlib.contextmanager
def table_is(table: Mapping[str, Config]) -> Iterator[None]:
    """Inside, `table` stands for the file."""
    before = _table
    try:
        _replace(table)
        yield
    finally:
        _replace(before)


def _replace(table: Mapping[str, Config] | None) -> None:
    global _table
    _table = table
    for function in (forward, backward):
        function.cache_clear()


def _rows(wanted: int, longest: int) -> int:
    """A power of two from 16 to longest that holds `wanted` rows."""
    return min(longest, max(16, 1 << (wanted - 1).bit_length()))


# The rules of half precision, by family and padded head dim (up to the one given): as many queries and keys as compile without spills, or
# nearly so, and leave room for two or three stages in shared memory. The rows of a tile (queries; keys for dkv) are at least 16 for each
# warp: the compiler gives every warp rows of its own, and with fewer rows it lets two warps compute the same. On sm_90 four warps need 64
# rows for wgmma, whose second operand should have at least 64 columns: with fewer it waits for shared memory.
_FORWARD = {
    "sm_80": {48: Config(128, 64, 8, 3), 64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
    "sm_86": {48: Config(128, 64, 8, 3), 64: Config(128, 64, 4, 3), 128: Config(128, 64, 8, 2), 256: Config(64, 32, 4, 2)},
    "sm_90": {48: Config(128, 64, 8, 3), 64: Config(128, 128, 8, 3), 128: Config(128, 128, 8, 2), 256: Config(128, 64, 8, 2)},
    "sm_100": {128: Config(128, 64, 8, 3), 256: Config(128, 32, 8, 2)},
    "cdna": {64: Config(128, 64, 4, 2), 128: Config(128, 64, 8, 2), 256: Config(128, 32, 8, 2)},
    "rdna": {64: Config(64, 64, 4, 1), 128: Config(64, 32, 8, 1), 256: Config(32, 32, 8, 1)},
}  # fmt: skip
_DQ = {
    "sm_80": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(32, 32, 4, 1)},
    "sm_86": {64: Config(128, 64, 8, 2), 128: Config(128, 32, 8, 2), 256: Config(32, 32, 4, 1)},
    "sm_90": {128: Config(128, 64, 8, 2), 192: Config(128, 32, 8, 2), 256: Config(64, 32, 4, 2)},
    "sm_100": {128: Config(128, 64, 8, 2), 256: Config(32, 32, 4, 1)},
    "cdna": {64: Config(128, 64, 8, 2), 128: Config(64, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    "rdna": {64: Config(64, 32, 8, 1), 256: Config(32, 16, 4, 1)},
}  # fmt: skip
_DKV = {
    "sm_80": {64: Config(32, 128, 8, 2), 128: Config(32, 64, 4, 2), 256: Config(16, 32, 4, 1)},
    "sm_86": {128: Config(32, 64, 4, 2), 256: Config(16, 32, 4, 1)},
    "sm_90": {128: Config(32, 128, 8, 2), 256: Config(16, 32, 4, 1)},
    "sm_100": {128: Config(32, 128, 8, 2), 256: Config(16, 32, 4, 1)},
    "cdna": {64: Config(32, 64, 4, 2), 128: Config(32, 64, 4, 1), 256: Config(32, 32, 4, 1)},
    "rdna": {64: Config(16, 64, 8, 1), 256: Config(16, 16, 4, 1)},
}  # fmt: skip

# fp32 has no tensor cores without tf32: smaller tiles keep its operands in registers, on every chip.
_FORWARD_FP32 = {64: Config(64, 32, 8, 2), 128: Config(64, 16, 8, 2), 256: Config(32, 16, 8, 2)}
_DQ_FP32 = {64: Config(32, 32, 4, 1), 128: Config(32, 16, 8, 1), 256: Config(16, 16, 4, 1)}
_DKV_FP32 = {64: Config(32, 32, 4, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)}


def _rule(rules: Mapping[int, Config], width: int) -> Config:
    return next((config for limit, config in rules.items() if width <= limit), rules[256])


@functools.lru_cache(maxsize=4096)
def forward(
    D: int, Dv: int, dtype: torch.dtype, rows: int, arch: int, masked: bool = False, descriptors: bool = True
) -> Config:
    """rows: query rows that one program could take. masked: causal or a window. descriptors: whether the kernel with them may be
    chosen."""
    width = max(sum(parts(D)), sum(parts(Dv)))
    entry = _entry("forward masked" if masked else "forward", width, dtype, rows, arch)
    if entry is not None and (descriptors or entry.variant == PLAIN):
        config = entry
    else:
        config = _rule(_FORWARD_FP32 if dtype == torch.float32 else _FORWARD[family(arch)], width)
    block_m = _rows(rows, config.block_m)
    return config if block_m == config.block_m else Config(block_m, min(64, config.block_n), 4, min(2, config.stages))


@functools.lru_cache(maxsize=4096)
def packs(Sq: int, q_per_kv: int, block_m: int) -> bool:
    """Whether the query heads that share a KV head become rows of one program: where that makes clearly fewer blocks."""
    if q_per_kv == 1:
        return False
    return 10 * -(-Sq * q_per_kv // block_m) < 9 * q_per_kv * -(-Sq // block_m)


@functools.lru_cache(maxsize=4096)
def backward(D: int, Dv: int, dtype: torch.dtype, rows: int, arch: int) -> tuple[Config, Config]:
    """Configs of the kernel for dq, where queries stay and keys stream, and of that for dk and dv, where it is the other way round."""
    width = max(sum(parts(D)), sum(parts(Dv)))
    single = dtype == torch.float32
    dq = _rule(_DQ_FP32 if single else _DQ[family(arch)], width)
    dkv = _rule(_DKV_FP32 if single else _DKV[family(arch)], width)
    return _entry("dq", width, dtype, rows, arch) or dq, _entry("dkv", width, dtype, rows, arch) or dkv
