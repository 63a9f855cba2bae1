"""Rows of a KV cache: where they lie, how int8 and fp8 are read and written, and rotary embedding on the way in."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .scores import clamped
from .tiles import ROUND, to

FLOAT, INT8, FP8 = (tl.constexpr(i) for i in range(3))  # how a cache stores its values


class Cache(NamedTuple):
    """One of the two caches. Its scale has the cache's shape without the last dimension, by its strides."""

    data: Any  # fp8 as uint8
    strides: Any  # (page or sequence, row, head)
    scale: Any
    scale_strides: Any
    kind: Any  # tl.constexpr of FLOAT, INT8, FP8
    per_token: Any  # tl.constexpr: the scale is written at append


class Rotary(NamedTuple):
    cos: Any  # [positions, half], or None
    sin: Any
    strides: Any  # of a position, in cos and in sin
    positions: Any


@triton.jit
def slots(table, b, t, page_size, pages, valid):
    """(page, row) of the positions t of sequence b, int64, and whether they are valid and in the cache; without a table the sequence
    itself is the page."""
    if table is not None:
        page = tl.load(table + t // page_size, mask=valid, other=0).to(tl.int64)
        return page, (t % page_size).to(tl.int64), valid & (page >= 0) & (page < pages)
    else:
        return t.to(tl.int64) * 0 + b, t.to(tl.int64), valid


@triton.jit
def decoded(x, cache, dtype: tl.constexpr):
    """Stored values in dtype, without their scale. fp8 e4m3 is fp16 with a smaller exponent: 2**8 makes up for the bias."""
    if cache.kind == 2:
        bits = x.to(tl.int32)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True).to(
            tl.float32
        ) * 256
        return to(tl.where((bits & 0x7F) == 0x7F, float("nan"), half), dtype)
    elif cache.kind == 1:
        return to(x.to(tl.float32), dtype)
    else:
        return x


@triton.jit
def _encoded(x, KIND: tl.constexpr):
    """fp32 within the range of the format, rounded to nearest even: int8, or the bits of fp8 e4m3."""
    if KIND == 1:
        return ((x + ROUND) - ROUND).to(tl.int8)
    else:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
        small = ((tl.abs(x) * 512 + ROUND) - ROUND).to(tl.int32)  # below 2**-6 the steps are 2**-9
        code = tl.where(tl.abs(x) < 0.015625, small, normal) | ((bits >> 24) & 0x80)
        return tl.where(x != x, 0x7F, code).to(tl.uint8)


@triton.jit
def rotated(row, columns, mask, rotary, position, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """fp32 values of row + columns, rotated by the angles of `position`: x[c] cos - x[partner] sin, or + for a pair's second. Positions
    that the tables do not have leave them as they are."""
    x = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
    if rotary.cos is not None:
        inside = mask & (columns < 2 * HALF) & (position >= 0) & (position < rotary.positions)
        if INTERLEAVED:
            second = columns % 2 == 1
            pair = columns // 2
            partner = columns ^ 1
        else:
            second = columns >= HALF
            pair = columns % HALF
            partner = tl.where(second, columns - HALF, columns + HALF)
        other = tl.load(row + partner, mask=inside, other=0.0).to(tl.float32)
        cosine = tl.load(rotary.cos + position * rotary.strides[0] + pair, mask=inside, other=1.0).to(tl.float32)
        sine = tl.load(rotary.sin + position * rotary.strides[1] + pair, mask=inside, other=0.0).to(tl.float32)
        x = x * cosine + tl.where(second, other, -other) * sine
    return x


@triton.jit
def _put(cache, page, row, head, columns, mask, x):
    """Stores a vector, with its own scale where the cache has one per token."""
    place = cache.data + page * cache.strides[0] + row * cache.strides[1] + head * cache.strides[2] + columns
    if cache.kind == 0:
        tl.store(place, to(x, cache.data.dtype.element_ty), mask=mask)
    else:
        limit = 127.0 if cache.kind == 1 else 448.0
        scale_place = (
            cache.scale + page * cache.scale_strides[0] + row * cache.scale_strides[1] + head * cache.scale_strides[2]
        )
        if cache.per_token:
            scale = tl.div_rn(tl.max(tl.abs(x), 0), limit)
            tl.store(scale_place, scale)
        else:
            scale = tl.load(scale_place)
        x = tl.where(scale == 0, 0.0, tl.div_rn(x, tl.where(scale == 0, 1.0, scale)))
        x = tl.minimum(tl.maximum(x, -limit), limit)
        tl.store(place, _encoded(x, cache.kind), mask=mask)


@triton.jit(do_not_specialize=["new", "heads", "page_size", "pages", "capacity"])
def append_rows(
    k, v, k_cache, v_cache, k_strides, v_strides, kv_lens, table, table_stride, rotary, new, heads, page_size, pages, capacity,
    D: tl.constexpr, DV: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program for one head of one new token: k [B, new, heads, D] rotated and stored at kv_lens[b] + i, v as it is. A token that has
    no place in the cache is not stored."""
    token = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    b, i = (token // new).to(tl.int64), (token % new).to(tl.int64)
    t = clamped(tl.load(kv_lens + b), capacity) + i
    if t >= capacity:
        return
    if table is not None:
        table += b * table_stride
    page, row, stored = slots(table, b, t, page_size, pages, t >= 0)
    if not stored:
        return
    columns = tl.arange(0, BLOCK_K)
    source = k + b * k_strides[0] + i * k_strides[1] + head * k_strides[2]
    _put(
        k_cache,
        page,
        row,
        head,
        columns,
        columns < D,
        rotated(source, columns, columns < D, rotary, t, HALF, INTERLEAVED),
    )
    columns = tl.arange(0, BLOCK_V)
    source = v + b * v_strides[0] + i * v_strides[1] + head * v_strides[2]
    x = tl.load(source + columns, mask=columns < DV, other=0.0).to(tl.float32)
    _put(v_cache, page, row, head, columns, columns < DV, x)
