"""Loads, stores and products of tiles whose width, a head dim, is not a power of two.

Such a tile is two parts, of a power of two each: 96 = 64 + 32, 80 = 64 + 16, 192 = 128 + 64. The second part is None where one is enough.
"""

from __future__ import annotations

import triton
import triton.language as tl


def parts(width: int) -> tuple[int, int]:
    """The two widths. 72 = 64 + 16 with 8 columns of zeros; where the sum would be a power of two, one part takes it all."""
    whole = max(16, 1 << (width - 1).bit_length())
    first = whole // 2
    second = max(16, 1 << max(width - first - 1, 0).bit_length())
    return (whole, 0) if first < 16 or first + second >= whole else (first, second)


@triton.jit
def load_part(base, rows, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, CHECK: tl.constexpr):
    """[rows, WIDTH] from column FIRST on; rows: int64 offsets. Zeros beyond DIM and, with CHECK, where valid is False."""
    columns = FIRST + tl.arange(0, WIDTH)
    places = base + rows[:, None] + columns[None, :]
    if FIRST + WIDTH > DIM:
        if CHECK:
            return tl.load(places, mask=valid[:, None] & (columns < DIM)[None, :], other=0.0)
        else:
            return tl.load(places, mask=(columns < DIM)[None, :], other=0.0)
    else:
        if CHECK:
            return tl.load(places, mask=valid[:, None], other=0.0)
        else:
            return tl.load(places)


@triton.jit
def load(base, rows, valid, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr, CHECK: tl.constexpr):
    x0 = load_part(base, rows, valid, 0, W0, DIM, CHECK)
    if W1 > 0:
        return x0, load_part(base, rows, valid, W0, W1, DIM, CHECK)
    else:
        return x0, None


@triton.jit
def store_part(base, rows, valid, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    places = base + rows[:, None] + columns[None, :]
    tl.store(places, x.to(base.dtype.element_ty), mask=valid[:, None] & (columns < DIM)[None, :])


@triton.jit
def store(base, rows, valid, x0, x1, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr):
    store_part(base, rows, valid, x0, 0, W0, DIM)
    if W1 > 0:
        store_part(base, rows, valid, x1, W0, W1, DIM)


@triton.jit
def dot_rows(a0, a1, b0, b1):
    """a @ b.T over both parts, fp32, without tf32."""
    x = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if a1 is not None:
        x = tl.dot(a1, tl.trans(b1), x, input_precision="ieee")
    return x


@triton.jit
def add_product(x0, x1, a, b0, b1):
    """x + a @ b for both parts of b."""
    x0 = tl.dot(a.to(b0.dtype), b0, x0, input_precision="ieee")
    if b1 is not None:
        x1 = tl.dot(a.to(b1.dtype), b1, x1, input_precision="ieee")
    return x0, x1
