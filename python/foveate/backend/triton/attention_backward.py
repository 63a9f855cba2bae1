"""Backward attention without atomics, so that two runs give the same bits: one kernel for dq, where a block of queries walks over the
keys, and one for dk and dv, where a block of keys walks over the queries of all heads that share it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_statistics import load_statistics, of_columns, of_rows, query_ranges, tile_gradients
from .scores import Problem, dropout_mask, key_ranges, sequence
from .tiles import add_product, dot_rows, load, store, zeros


@triton.jit
def _bucket_sums(dtable, ds, i, j, inside, offset, opts, BUCKETS: tl.constexpr):
    """dtable + the sum of ds over each bucket of the relative bias. A tile has few of them: all far distances share one."""
    buckets = tl.load(opts.rel_buckets + (j - i - offset + opts.rel_shape[1]), mask=inside, other=-1)
    highest = tl.max(tl.max(buckets, 1), 0)
    lowest = tl.min(tl.min(tl.where(buckets < 0, BUCKETS, buckets), 1), 0)
    for bucket in range(lowest, highest + 1):
        part = tl.sum(tl.sum(tl.where(buckets == bucket, ds, 0.0), 1), 0)
        dtable += tl.where(tl.arange(0, BUCKETS) == bucket, part, 0.0)
    return dtable


@triton.jit
def _attend_keys(
    dq0, dq1, dtable, q0, q1, g0, g1, statistics, rows, k, v, k_stride, v_stride, start, end, i, valid, problem, opts, D, DV,
    BLOCK_N: tl.constexpr, BUCKETS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys start..end into dq and dtable."""
    b, h, Hq, keys = problem.b, problem.h, problem.Hq, problem.keys
    step = tl.arange(0, BLOCK_N)
    one = tl.full([], 1, tl.int64)
    for first in range(start, end, BLOCK_N):
        j = first + step
        here = step.to(tl.int64)
        k0, k1 = load(k + first * one * k_stride, here * k_stride, j < keys, D, MASKED)
        v0, v1 = load(v + first * one * v_stride, here * v_stride, j < keys, DV, MASKED)
        # S = Q K^T and dP = dO V^T [BLOCK_M, BLOCK_N] -> dS, and its product with the scale and softcap's derivative
        keep = None
        if opts.philox is not None:
            keep = dropout_mask(i, b * Hq + h, first, opts, BLOCK_N, False)
        inside = valid[:, None] & (j < keys)[None, :]
        _, ds, dqk = tile_gradients(
            dot_rows(q0, q1, k0, k1, D), dot_rows(g0, g1, v0, v1, DV), keep, of_rows(statistics), rows, i[:, None], j[None, :],
            inside, problem, opts, MASKED)  # fmt: skip
        # dQ [BLOCK_M, D] += dS K
        dq0, dq1 = add_product(dq0, dq1, dqk, k0, k1, D)
        if BUCKETS > 0:
            dtable = _bucket_sums(dtable, ds, i[:, None], j[None, :], inside, problem.offset, opts, BUCKETS)
    return dq0, dq1, dtable


@triton.jit(do_not_specialize=["Hq", "Sq", "Skv", "blocks", "left", "right"])
def attention_dq(
    q, k, v, dout, dq, dtable_parts, rows, q_strides, k_strides, v_strides, dout_strides, dq_strides, Hq, Sq, Skv, blocks, left, right,
    opts, D, DV, Q_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """dq, and with BUCKETS > 0 dtable_parts [B, blocks, Hq, BUCKETS], each block's part of the gradient of the relative table."""
    # The queries i [BLOCK_M] of one head: Q, dO and the statistics of their rows stay for all keys
    block = blocks - 1 - tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b, h = bh // Hq, bh % Hq
    first_q, first_k, queries, keys, _ = sequence(opts, b, Sq, Skv)
    offset = keys - queries
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = i < queries
    b64, head, kv_head = b.to(tl.int64), h.to(tl.int64), (h // Q_PER_KV).to(tl.int64)
    k += b64 * k_strides[0] + first_k * k_strides[2] + kv_head * k_strides[1]
    v += b64 * v_strides[0] + first_k * v_strides[2] + kv_head * v_strides[1]
    row = first_q + i
    q0, q1 = load(q + b64 * q_strides[0] + head * q_strides[1], row * q_strides[2], valid, D, True)
    g0, g1 = load(dout + b64 * dout_strides[0] + head * dout_strides[1], row * dout_strides[2], valid, DV, True)
    index = b64 * rows.strides[0] + head * rows.strides[1] + row
    statistics = load_statistics(rows, index, valid, True)

    # The keys: those that only some queries see, at the left end; those that all see, without masks; those at the right end
    dq0 = zeros(BLOCK_M, D.first, Hq)
    dq1 = dq0
    if D.second > 0:
        dq1 = zeros(BLOCK_M, D.second, Hq)
    dtable = tl.zeros([BUCKETS if BUCKETS > 0 else 1], tl.float32)
    first, last = block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, queries) - 1
    problem = Problem(b, h, Hq, keys, offset, left, right)
    start, full_start, full_end, end = key_ranges(first, last, problem, opts, BLOCK_N)
    if first >= queries:
        start, full_start, full_end, end = 0, 0, 0, 0
    if opts.has_left:
        dq0, dq1, dtable = _attend_keys(
            dq0, dq1, dtable, q0, q1, g0, g1, statistics, rows, k, v, k_strides[2], v_strides[2], start, full_start, i, valid, problem,
            opts, D, DV, BLOCK_N, BUCKETS, True)  # fmt: skip
    dq0, dq1, dtable = _attend_keys(
        dq0, dq1, dtable, q0, q1, g0, g1, statistics, rows, k, v, k_strides[2], v_strides[2], full_start, full_end, i, valid, problem,
        opts, D, DV, BLOCK_N, BUCKETS, False)  # fmt: skip
    dq0, dq1, dtable = _attend_keys(
        dq0, dq1, dtable, q0, q1, g0, g1, statistics, rows, k, v, k_strides[2], v_strides[2], full_end, end, i, valid, problem,
        opts, D, DV, BLOCK_N, BUCKETS, True)  # fmt: skip

    # dQ times the scale, and the block's part of dtable
    dq0 = dq0 * opts.scale
    if D.second > 0:
        dq1 = dq1 * opts.scale
    store(dq + b64 * dq_strides[0] + head * dq_strides[1], row * dq_strides[2], valid, dq0, dq1, D)
    if BUCKETS > 0:
        part = dtable_parts + ((b64 * blocks + block) * Hq + h) * BUCKETS
        tl.store(part + tl.arange(0, BUCKETS), dtable)


@triton.jit
def _attend_queries(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, dout, rows, q_stride, dout_stride, index, start, end, first, j, queries, problem, opts, D, DV,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the queries start..end into dk and dv. Tiles are [keys, queries]: so the products that sum over queries need no transposed
    tile of weights."""
    b, h, Hq, keys = problem.b, problem.h, problem.Hq, problem.keys
    step = tl.arange(0, BLOCK_M)
    one = tl.full([], 1, tl.int64)
    for first_i in range(start, end, BLOCK_M):
        i = first_i + step
        here = step.to(tl.int64)
        valid = i < queries
        q0, q1 = load(q + first_i * one * q_stride, here * q_stride, valid, D, MASKED)
        g0, g1 = load(dout + first_i * one * dout_stride, here * dout_stride, valid, DV, MASKED)
        statistics = load_statistics(rows, index + (first_i + here), valid, MASKED)
        # S^T = K Q^T and dP^T = V dO^T [BLOCK_N, BLOCK_M] -> P^T with dropout, dS^T
        keep = None
        if opts.philox is not None:
            keep = dropout_mask(i, b * Hq + h, first, opts, BLOCK_N, True)
        inside = valid[None, :] & (j < keys)[:, None]
        weights, _, dqk = tile_gradients(
            dot_rows(k0, k1, q0, q1, D), dot_rows(v0, v1, g0, g1, DV), keep, of_columns(statistics), rows, i[None, :], j[:, None],
            inside, problem, opts, MASKED)  # fmt: skip
        # dV [BLOCK_N, Dv] += P^T dO, dK [BLOCK_N, D] += dS^T Q
        dv0, dv1 = add_product(dv0, dv1, weights, g0, g1, DV)
        dk0, dk1 = add_product(dk0, dk1, dqk, q0, q1, D)
    return dk0, dk1, dv0, dv1


@triton.jit(do_not_specialize=["Hq", "Sq", "Skv", "blocks", "left", "right"])
def attention_dkv(
    q, k, v, dout, dk, dv, rows, q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides, Hq, Sq, Skv, blocks,
    left, right, opts, D, DV, Q_PER_KV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys of one KV head, in registers over its Q_PER_KV query heads. Keys beyond kv_lens get zeros."""
    # The keys j [BLOCK_N] of one KV head: K and V stay for all queries
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    kv_heads = Hq // Q_PER_KV
    b, kv = bh // kv_heads, bh % kv_heads
    first_q, first_k, queries, keys, key_rows = sequence(opts, b, Sq, Skv)
    one = tl.full([], 1, tl.int64)
    rows_of_b = b * one * rows.strides[0] + first_q
    head_step = one * rows.strides[1]
    first = block * BLOCK_N
    if first >= key_rows:
        return
    offset = keys - queries
    j = first + tl.arange(0, BLOCK_N)
    b64, kv_head = b.to(tl.int64), kv.to(tl.int64)
    row = first_k + j
    k0, k1 = load(k + b64 * k_strides[0] + kv_head * k_strides[1], row * k_strides[2], j < keys, D, True)
    v0, v1 = load(v + b64 * v_strides[0] + kv_head * v_strides[1], row * v_strides[2], j < keys, DV, True)
    dk0 = zeros(BLOCK_N, D.first, Hq)
    dv0 = zeros(BLOCK_N, DV.first, Hq)
    dk1 = dk0
    dv1 = dv0
    if D.second > 0:
        dk1 = zeros(BLOCK_N, D.second, Hq)
    if DV.second > 0:
        dv1 = zeros(BLOCK_N, DV.second, Hq)
    group = Problem(b, kv * Q_PER_KV, Hq, keys, offset, left, right)  # its first head
    last = tl.minimum(first + BLOCK_N, key_rows) - 1
    start, full_start, full_end, end = query_ranges(first, last, queries, group, opts, BLOCK_M)
    # Each query head in turn; its queries by ranges, as the keys of `attention_dq`
    for member in range(Q_PER_KV):
        h = kv * Q_PER_KV + member
        problem = Problem(b, h, Hq, keys, offset, left, right)
        head = h * one
        qh = q + b64 * q_strides[0] + first_q * q_strides[2] + head * q_strides[1]
        gh = dout + b64 * dout_strides[0] + first_q * dout_strides[2] + head * dout_strides[1]
        index = rows_of_b + head * head_step
        if opts.has_right:
            dk0, dk1, dv0, dv1 = _attend_queries(
                dk0, dk1, dv0, dv1, k0, k1, v0, v1, qh, gh, rows, q_strides[2], dout_strides[2], index, start, full_start, first, j,
                queries, problem, opts, D, DV, BLOCK_M, BLOCK_N, True)  # fmt: skip
        dk0, dk1, dv0, dv1 = _attend_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, qh, gh, rows, q_strides[2], dout_strides[2], index, full_start, full_end, first, j,
            queries, problem, opts, D, DV, BLOCK_M, BLOCK_N, False)  # fmt: skip
        dk0, dk1, dv0, dv1 = _attend_queries(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, qh, gh, rows, q_strides[2], dout_strides[2], index, full_end, end, first, j,
            queries, problem, opts, D, DV, BLOCK_M, BLOCK_N, True)  # fmt: skip

    # dK times the scale, dV
    dk0 = dk0 * opts.scale
    if D.second > 0:
        dk1 = dk1 * opts.scale
    store(dk + b64 * dk_strides[0] + kv_head * dk_strides[1], row * dk_strides[2], j < key_rows, dk0, dk1, D)
    store(dv + b64 * dv_strides[0] + kv_head * dv_strides[1], row * dv_strides[2], j < key_rows, dv0, dv1, DV)
