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


class Config(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    warps: int
    stages: int
    variant: int = PLAIN


def key(kind: str, width: int, dtype: torch.dtype, queries: int, arch: int) -> str:
    """The place in the table: kind is "forward", "forward masked" (causal or windowed), "dq" or "dkv"; width the padded head dim."""
    return f"sm_{arch} {kind} {width} {'fp32' if dtype == torch.float32 else 'half'} {'long' if queries >= LONG else 'short'}"


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


@functools.lru_cache(maxsize=4096)
def forward(
    D: int, Dv: int, dtype: torch.dtype, rows: int, arch: int, masked: bool = False, descriptors: bool = True
) -> Config:
    """rows: query rows that one program could take. arch: 80, 90, 100, ... (0 for the interpreter). masked: causal or a window.
    descriptors: whether the kernel with them may be chosen.

    Half precision: 128 queries, and as many keys as leave two or three stages in the shared memory of the chip (163 KiB on sm_80, 227
    on sm_90 and sm_100). fp32 has no tensor cores without tf32: smaller tiles keep its operands in registers.
    """
    width = max(sum(parts(D)), sum(parts(Dv)))
    roomy = arch >= 90
    entry = _entry("forward masked" if masked else "forward", width, dtype, rows, arch)
    if entry is not None and (descriptors or entry.variant == PLAIN):
        config = entry
    elif dtype == torch.float32:
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
def backward(D: int, Dv: int, dtype: torch.dtype, rows: int, arch: int) -> tuple[Config, Config]:
    """Of the kernel for dq, where the queries stay and the keys pass, and of the one for dk and dv, where it is the other way round."""
    width = max(sum(parts(D)), sum(parts(Dv)))
    dq, dkv = _backward_rules(width, dtype, arch)
    return _entry("dq", width, dtype, rows, arch) or dq, _entry("dkv", width, dtype, rows, arch) or dkv


def _backward_rules(width: int, dtype: torch.dtype, arch: int) -> tuple[Config, Config]:
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
