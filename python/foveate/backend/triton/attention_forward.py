"""Forward attention: one program for a block of queries of one head, or of the heads that share a KV head (GROUP > 1).

FlashAttention-2 (Dao 2023, arXiv 2307.08691). The keys are walked in up to three ranges: those that the left edge of the window crosses,
those that every query of the block sees, which need no mask, and those that the diagonal or the end of the keys crosses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LOG2E, Problem, dropout_mask, fma, key_ranges, natural_lse, scores, sequence, visible
from .tiles import add_product, dot_rows, load, store, zeros


@triton.jit
def _attend_range(
    acc0, acc1, row_max, row_sum, q0, q1, k, v, k_stride, v_stride, start, end, i, valid, problem, opts, D, DV,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys start..end into acc, row_max and row_sum."""
    b, h, Hq, keys = problem.b, problem.h, problem.Hq, problem.keys
    step = tl.arange(0, BLOCK_N)
    one = tl.full([], 1, tl.int64)
    for first in range(start, end, BLOCK_N):
        j = first + step
        here = step.to(tl.int64)
        # S [BLOCK_M, BLOCK_N] = Q K^T, in powers of two; -inf where invisible
        k0, k1 = load(k + first * one * k_stride, here * k_stride, j < keys, D, MASKED)
        qk = dot_rows(q0, q1, k0, k1, D)
        i2, j2 = i[:, None], j[None, :]
        if opts.plain:
            factor = opts.scale_log2
            if MASKED:
                qk = tl.where(visible(i2, j2, problem, opts), qk, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(qk, 1) * factor)
        else:
            factor = 1.0
            qk, _, _ = scores(qk, i2, j2, valid[:, None] & (j < keys)[None, :], problem, opts)
            if MASKED:
                qk = tl.where(visible(i2, j2, problem, opts), qk, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(qk, 1))
        # P = exp2(S - row_max); row_max and row_sum [BLOCK_M] take the new keys in
        shift = new_max
        if MASKED or opts.guarded:
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # -inf - -inf would be NaN
        p = tl.exp2(fma(qk, factor, -shift[:, None]))
        rescale = tl.exp2(row_max - shift)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        if opts.philox is not None:
            bh = b * Hq + h
            if len(bh.shape) == 2:
                bh = tl.reshape(bh, [bh.shape[0]])
            p = tl.where(dropout_mask(i, bh, first, opts, BLOCK_N, False), p, 0.0)
        # acc [BLOCK_M, Dv] = acc * rescale + P V
        v0, v1 = load(v + first * one * v_stride, here * v_stride, j < keys, DV, MASKED)
        acc0 = acc0 * rescale[:, None]
        if DV.second > 0:
            acc1 = acc1 * rescale[:, None]
        acc0, acc1 = add_product(acc0, acc1, p, v0, v1, DV)
    return acc0, acc1, row_max, row_sum


@triton.jit(do_not_specialize=["Hq", "Sq", "Skv", "blocks", "left", "right"])
def attention_forward(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, lse_strides, Hq, Sq, Skv, blocks, left, right, opts, D, DV,
    Q_PER_KV: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Strides: (batch, head, row). D, DV: `Width`s of q and v. Q_PER_KV: query heads of a KV head; GROUP: how many of them are rows of
    one program, 1 or Q_PER_KV.

    Row r of a program's rows is query r // GROUP of head r % GROUP in the group.
    """
    # The rows of this program: r [BLOCK_M], its query i, its head
    block = blocks - 1 - tl.program_id(0) % blocks  # with causal the last blocks have the most keys: they go first
    bh = tl.program_id(0) // blocks
    groups = Hq // GROUP
    b, first_head = bh // groups, bh % groups * GROUP
    first_q, first_k, queries, keys, _ = sequence(opts, b, Sq, Skv)
    if block * BLOCK_M >= queries * GROUP:
        return
    offset = keys - queries
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = r // GROUP
    valid = r < queries * GROUP
    if GROUP > 1:
        h = (first_head + r % GROUP)[:, None]
        head = (first_head + r % GROUP).to(tl.int64)
    else:
        h = first_head
        head = tl.zeros([BLOCK_M], tl.int64) + first_head
    b64, kv_head = b.to(tl.int64), (first_head // Q_PER_KV).to(tl.int64)
    q += b64 * q_strides[0] + first_q * q_strides[2]
    k += b64 * k_strides[0] + first_k * k_strides[2] + kv_head * k_strides[1]
    v += b64 * v_strides[0] + first_k * v_strides[2] + kv_head * v_strides[1]
    # Q [BLOCK_M, D]; acc [BLOCK_M, DV] in its two parts, row_max and row_sum [BLOCK_M]
    q0, q1 = load(q, i.to(tl.int64) * q_strides[2] + head * q_strides[1], valid, D, True)

    acc0 = zeros(BLOCK_M, DV.first, Hq)
    acc1 = acc0
    if DV.second > 0:
        acc1 = zeros(BLOCK_M, DV.second, Hq)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    # The keys: those that only some rows see, at the left end; those that all see, without masks; those at the right end
    problem = Problem(b, h, Hq, keys, offset, left, right)
    first = block * BLOCK_M // GROUP
    last = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // GROUP, queries - 1)
    start, full_start, full_end, end = key_ranges(first, last, problem, opts, BLOCK_N)
    if opts.has_left:
        acc0, acc1, row_max, row_sum = _attend_range(
            acc0, acc1, row_max, row_sum, q0, q1, k, v, k_strides[2], v_strides[2], start, full_start, i, valid, problem, opts, D, DV,
            BLOCK_N, True)  # fmt: skip
    acc0, acc1, row_max, row_sum = _attend_range(
        acc0, acc1, row_max, row_sum, q0, q1, k, v, k_strides[2], v_strides[2], full_start, full_end, i, valid, problem, opts, D, DV,
        BLOCK_N, False)  # fmt: skip
    acc0, acc1, row_max, row_sum = _attend_range(
        acc0, acc1, row_max, row_sum, q0, q1, k, v, k_strides[2], v_strides[2], full_end, end, i, valid, problem, opts, D, DV,
        BLOCK_N, True)  # fmt: skip

    # lse without the sink, then out [BLOCK_M, Dv] = acc / row_sum with it
    if lse is not None:
        rows = b64 * lse_strides[0] + head * lse_strides[1] + first_q + i
        some = row_sum > 0
        value = natural_lse(tl.where(some, row_max, 0.0), tl.where(some, row_sum, 1.0))
        tl.store(lse + rows, tl.where(some, value, float("-inf")), mask=valid)
    if opts.sinks is not None:
        sink = tl.load(opts.sinks + head) * LOG2E
        row_sum += tl.exp2(sink - tl.where(row_max == float("-inf"), 0.0, row_max))
    factor = 1 / tl.where(row_sum > 0, row_sum, 1.0)  # acc is 0 where row_sum is
    if opts.philox is not None:
        factor *= opts.dropout_scale
    acc0 = acc0 * factor[:, None]
    if DV.second > 0:
        acc1 = acc1 * factor[:, None]
    out += b64 * out_strides[0] + first_q * out_strides[2]
    store(out, i.to(tl.int64) * out_strides[2] + head * out_strides[1], valid, acc0, acc1, DV)
