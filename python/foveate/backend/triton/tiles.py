"""Loads, stores and products of tiles whose width, a head dim, is not a power of two.

Such a tile is two parts, of a power of two each: 96 = 64 + 32, 80 = 64 + 16, 192 = 128 + 64. Where one is enough the second width is 0.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

# triton 3.6's interpreter multiplies the bit patterns of bf16, forgets the carry when it rounds to bf16, and is slow in fp16: there
# products are taken in fp32, of operands rounded as on a GPU.
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

ROUND: tl.constexpr = tl.constexpr(
    12582912.0
)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest even integer


def parts(width: int, halves: bool = False) -> tuple[int, int]:
    """The two widths. 72 = 64 + 16 with 8 columns of zeros; where the sum would be a power of two, one part takes it all, or with halves
    each takes a half: sums over the head dim in fp32 round less, the fewer terms they have one after the other."""
    whole = max(16, 1 << (width - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << max(width - first - 1, 0).bit_length())
    if first >= 16 and first + second < whole:
        return first, second
    return (first, first) if halves and first >= 16 else (whole, 0)


class Width(NamedTuple):
    """A head dim and the widths of its two parts, each a tl.constexpr."""

    whole: Any
    first: Any
    second: Any  # 0 where one part is enough


@functools.lru_cache(maxsize=256)
def width(dim: int, halves: bool = False) -> Width:
    return Width(tl.constexpr(dim), *map(tl.constexpr, parts(dim, halves)))


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr, positive):
    """fp32 zeros, which on sm_90 the compiler does not know to be 0; positive: any argument above 0.

    For sums that begin before a loop. Constants would be written to them once more where the loop has no iterations, and as the last wgmma
    of a loop is still under way when it ends, ptxas then waits for each wgmma of the kernel before it starts the next (its remark C7515).
    """
    if cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0):
        place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        return (place < -positive).to(tl.float32)
    else:
        return tl.zeros([ROWS, COLUMNS], tl.float32)


@triton.jit
def load_part(base, rows, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, CHECK: tl.constexpr):
    """[rows, WIDTH] from column FIRST on; rows: int64 offsets. Zeros beyond DIM and, with CHECK, where valid is False."""
    columns = tl.arange(0, WIDTH) + FIRST
    pointers = base + rows[:, None] + columns[None, :]
    if FIRST + WIDTH > DIM:
        if CHECK:
            return tl.load(pointers, mask=valid[:, None] & (columns < DIM)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(columns < DIM)[None, :], other=0.0)
    else:
        if CHECK:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def load(base, rows, valid, width, CHECK: tl.constexpr):
    """Both parts of a tile, [rows, width.first] and [rows, width.second]."""
    x0 = load_part(base, rows, valid, 0, width.first, width.whole, CHECK)
    if width.second > 0:
        return x0, load_part(base, rows, valid, width.first, width.second, width.whole, CHECK)
    else:
        return x0, x0  # a function returns tensors only; nothing uses this one


@triton.jit
def store_part(base, rows, valid, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    columns = tl.arange(0, WIDTH) + FIRST
    pointers = base + rows[:, None] + columns[None, :]
    tl.store(pointers, to(x, base.dtype.element_ty), mask=valid[:, None] & (columns < DIM)[None, :])


@triton.jit
def store(base, rows, valid, x0, x1, width):
    store_part(base, rows, valid, x0, 0, width.first, width.whole)
    if width.second > 0:
        store_part(base, rows, valid, x1, width.first, width.second, width.whole)


@triton.jit
def to(x, dtype: tl.constexpr):
    """x, fp32, rounded to nearest even in dtype."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in fp32, without tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def dot_rows(a0, a1, b0, b1, width):
    """a @ b.T over both parts, fp32; of fp32 each part's sum by itself."""
    x = dot(a0, tl.trans(b0), tl.zeros([a0.shape[0], b0.shape[0]], tl.float32))
    if width.second > 0:
        if a0.dtype == tl.float32:
            x += dot(a1, tl.trans(b1), tl.zeros([a0.shape[0], b0.shape[0]], tl.float32))
        else:
            x = dot(a1, tl.trans(b1), x)
    return x


@triton.jit
def add_product(x0, x1, a, b0, b1, width):
    """x + a @ b for both parts of b, with a rounded to b's dtype."""
    a = to(a, b0.dtype)
    x0 = dot(a, b0, x0)
    if width.second > 0:
        x1 = dot(a, b1, x1)
    return x0, x1
