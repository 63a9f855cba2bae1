"""Attention over a KV cache: the keys of a sequence are divided among programs, and a second kernel combines their results.

One program takes the query rows that share a KV head (query i of head g is row i * Q_PER_KV + g), so each key is read once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kv_append import decoded, rotated, slots
from .scores import LOG2E, Problem, clamped, natural_lse, scores, visible
from .tiles import add_product, dot_rows, load_part, store, to


@triton.jit
def _query_part(q, rows, valid, rotary, position, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                INTERLEAVED: tl.constexpr):  # fmt: skip
    columns = (tl.arange(0, WIDTH) + FIRST)[None, :]
    mask = valid[:, None] & (columns < D)
    return to(
        rotated(q + rows[:, None], columns, mask, rotary, position[:, None], HALF, INTERLEAVED), q.dtype.element_ty
    )


@triton.jit
def _cache_tile(cache, page, row, head, valid, width, dtype: tl.constexpr):
    pointers = page * cache.strides[0] + row * cache.strides[1] + head * cache.strides[2]
    x0 = decoded(load_part(cache.data, pointers, valid, 0, width.first, width.whole, True), cache, dtype)
    if width.second > 0:
        return x0, decoded(
            load_part(cache.data, pointers, valid, width.first, width.second, width.whole, True), cache, dtype
        )
    else:
        return x0, x0


@triton.jit
def _cache_scale(cache, page, row, head, valid):
    pointers = page * cache.scale_strides[0] + row * cache.scale_strides[1] + head * cache.scale_strides[2]
    return tl.load(cache.scale + pointers, mask=valid, other=0.0)


_SIZES = ["Hq", "Sq", "new", "blocks", "page_size", "pages", "capacity", "splits", "keys_per_split", "left", "right"]


@triton.jit(do_not_specialize=_SIZES)
def decode_split(
    q, k_cache, v_cache, out, lse, part_out, part_lse, q_strides, out_strides, table, table_stride, rotary, Hq, Sq, new, blocks,
    page_size, pages, capacity, splits, keys_per_split, left, right, opts, D, DV, Q_PER_KV: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, APPENDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, Sq, Hq, DV] and lse [B, Hq, Sq], or with part_out [splits, B, Hq, Sq, DV] and part_lse [splits, B, Hq, Sq] (in powers of
    two) the part of one split. D, DV: `Width`s of q and v. keys_per_split: 0 for equal parts of each sequence. Keys beyond the capacity
    and those on pages that the cache does not have are not seen."""
    # The rows of this program: r [BLOCK_M] of one KV head of one sequence, and the split of its keys
    split = tl.program_id(1)
    block = tl.program_id(0) % blocks
    owner = tl.program_id(0) // blocks
    kv_heads = Hq // Q_PER_KV
    b, kv_head = (owner // kv_heads).to(tl.int64), (owner % kv_heads).to(tl.int64)
    batches = tl.num_programs(0) // blocks // kv_heads
    before = clamped(tl.load(opts.kv_lens + b), capacity).to(tl.int32)
    keys = tl.minimum(before + new, capacity)
    offset = keys - Sq
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = r < Sq * Q_PER_KV
    i = r // Q_PER_KV
    head = kv_head * Q_PER_KV + r % Q_PER_KV
    position = (before if APPENDED else before - Sq) + i
    rows = b * q_strides[0] + i.to(tl.int64) * q_strides[1] + head * q_strides[2]
    # Q [BLOCK_M, D], rotated
    q0 = _query_part(q, rows, valid, rotary, position, 0, D.first, D.whole, HALF, INTERLEAVED)
    q1 = q0
    if D.second > 0:
        q1 = _query_part(q, rows, valid, rotary, position, D.first, D.second, D.whole, HALF, INTERLEAVED)

    # The keys of the split that some row sees: start..end
    lowest = 0
    highest = keys
    if opts.has_left:
        lowest = tl.maximum(block * BLOCK_M // Q_PER_KV + offset - left, 0)
    if opts.has_right:
        highest = tl.minimum(keys, tl.minimum((block * BLOCK_M + BLOCK_M - 1) // Q_PER_KV, Sq - 1) + offset + right + 1)
    split_keys = keys_per_split
    if keys_per_split == 0:
        split_keys = tl.cdiv(tl.cdiv(keys, splits), BLOCK_N) * BLOCK_N
    start = tl.maximum(split * split_keys, lowest // BLOCK_N * BLOCK_N)
    end = tl.minimum(split * split_keys + split_keys, highest)

    acc0 = tl.zeros([BLOCK_M, DV.first], tl.float32)
    acc1 = acc0
    if DV.second > 0:
        acc1 = tl.zeros([BLOCK_M, DV.second], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    table_row = table
    if table is not None:
        table_row = table + b * table_stride
    # acc [BLOCK_M, DV], row_max and row_sum [BLOCK_M] take BLOCK_N keys a step
    problem = Problem(b, head[:, None], Hq, keys, offset, left, right)
    for first in range(start, end, BLOCK_N):
        j = first + tl.arange(0, BLOCK_N)
        inside = (j >= lowest) & (j < keys)  # pages before the window may be gone
        page, row, inside = slots(table_row, b, j, page_size, pages, inside)
        # S [BLOCK_M, BLOCK_N] = Q K^T, dequantised, in powers of two; -inf where invisible
        k0, k1 = _cache_tile(k_cache, page, row, kv_head, inside, D, q.dtype.element_ty)
        qk = dot_rows(q0, q1, k0, k1, D)
        if k_cache.scale is not None:
            qk = qk * _cache_scale(k_cache, page, row, kv_head, inside)[None, :]
        i2, j2 = i[:, None], j[None, :]
        s, _, _ = scores(qk, i2, j2, valid[:, None] & inside[None, :], problem, opts)
        s = tl.where(visible(i2, j2, problem, opts) & inside[None, :], s, float("-inf"))
        # P = exp2(S - row_max)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - shift[:, None])
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        # acc = acc * rescale + P V
        if v_cache.scale is not None:
            p = p * _cache_scale(v_cache, page, row, kv_head, inside)[None, :]
        v0, v1 = _cache_tile(v_cache, page, row, kv_head, inside, DV, q.dtype.element_ty)
        acc0 = acc0 * rescale[:, None]
        if DV.second > 0:
            acc1 = acc1 * rescale[:, None]
        acc0, acc1 = add_product(acc0, acc1, p, v0, v1, DV)

    # lse, then out or this split's part of it
    some = row_sum > 0
    lse2 = tl.where(some, tl.where(some, row_max, 0.0) + tl.log2(tl.where(some, row_sum, 1.0)), float("-inf"))
    index = (b * Hq + head) * Sq + i
    if part_out is None:
        tl.store(
            lse + index,
            tl.where(some, natural_lse(tl.where(some, row_max, 0.0), tl.where(some, row_sum, 1.0)), float("-inf")),
            mask=valid,
        )
        if opts.sinks is not None:
            row_sum += tl.exp2(tl.load(opts.sinks + head, mask=valid, other=0.0) * LOG2E - tl.where(some, row_max, 0.0))
    factor = (1 / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
    acc0 = acc0 * factor
    if DV.second > 0:
        acc1 = acc1 * factor
    if part_out is None:
        pointers = b * out_strides[0] + i.to(tl.int64) * out_strides[1] + head * out_strides[2]
        store(out, pointers, valid, acc0, acc1, DV)
    else:
        index += split.to(tl.int64) * batches * Hq * Sq
        tl.store(part_lse + index, lse2, mask=valid)
        store(part_out, index * DV.whole, valid, acc0, acc1, DV)


@triton.jit(do_not_specialize=["Hq", "Sq", "rows", "splits"])
def decode_combine(part_out, part_lse, out, lse, sinks, out_strides, Hq, Sq, rows, splits, DV: tl.constexpr, BLOCK_V: tl.constexpr,
                   BLOCK_S: tl.constexpr):  # fmt: skip
    """out and lse of one row from its splits: weights exp(part_lse - lse), with the sink in the denominator."""
    row = tl.program_id(0).to(tl.int64)
    b, h, i = row // (Hq * Sq), row // Sq % Hq, row % Sq
    # lse of the row from those of its splits
    s = tl.arange(0, BLOCK_S)
    lse2 = tl.load(part_lse + s * tl.full([], 1, tl.int64) * rows + row, mask=s < splits, other=float("-inf"))
    row_max = tl.max(lse2, 0)
    some = row_max > float("-inf")
    shift = tl.where(some, row_max, 0.0)
    row_sum = tl.sum(tl.exp2(lse2 - shift), 0)
    tl.store(lse + row, tl.where(some, natural_lse(shift, tl.where(some, row_sum, 1.0)), float("-inf")))
    if sinks is not None:
        row_sum += tl.exp2(tl.load(sinks + h) * LOG2E - shift)
    # out [DV] = the parts by their weights
    columns = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for split in range(splits):
        index = split * tl.full([], 1, tl.int64) * rows + row
        weight = tl.exp2(tl.load(part_lse + index) - shift)
        acc += weight * tl.load(part_out + index * DV + columns, mask=columns < DV, other=0.0)
    acc = acc / tl.where(row_sum > 0, row_sum, 1.0)
    index = out + b * out_strides[0] + i * out_strides[1] + h * out_strides[2]
    tl.store(index + columns, to(acc, out.dtype.element_ty), mask=columns < DV)
