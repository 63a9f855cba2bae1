"""The gradient of a bias that broadcasts: each program owns one tile of it and sums over the batches and heads that share the tile."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_statistics import load_statistics, of_rows, tile_gradients
from .scores import Problem, dropout_mask, key_ranges, sequence
from .tiles import dot_rows, load


@triton.jit(do_not_specialize=["B", "Hq", "Sq", "Skv", "left", "right", "shared_b", "shared_h"])
def attention_dbias(
    q, k, v, dout, dbias, rows, q_strides, k_strides, v_strides, dout_strides, dbias_strides, B, Hq, Sq, Skv, left, right,
    shared_b, shared_h, opts, D, DV, Q_PER_KV: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dbias [B / shared_b, Hq / shared_h, Sq, Skv]; with SUM_Q the third dimension has one sum for each block of queries instead, with
    SUM_K the fourth one for each block of keys."""
    blocks_m, blocks_n = tl.cdiv(Sq, BLOCK_M), tl.cdiv(Skv, BLOCK_N)
    tile = tl.program_id(0) % (blocks_m * blocks_n)
    owner = tl.program_id(0) // (blocks_m * blocks_n)
    block_m, block_n = tile // blocks_n, tile % blocks_n
    heads = Hq // shared_h
    bias_b, bias_h = owner // heads, owner % heads
    # dS [BLOCK_M, BLOCK_N], summed over the batches and heads that share this tile of the bias
    i = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    j = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(bias_b * shared_b, bias_b * shared_b + shared_b):
        _, _, queries, keys, _ = sequence(opts, b, Sq, Skv)
        offset = keys - queries
        last = tl.minimum(block_m * BLOCK_M + BLOCK_M, queries) - 1
        batch = Problem(b, bias_h * shared_h, Hq, keys, offset, left, right)  # its first head
        start, _, _, end = key_ranges(block_m * BLOCK_M, last, batch, opts, BLOCK_N)
        if block_n * BLOCK_N >= start and block_n * BLOCK_N < end:
            for h in range(bias_h * shared_h, bias_h * shared_h + shared_h):
                problem = Problem(b, h, Hq, keys, offset, left, right)
                sums += _tile(q, k, v, dout, rows, q_strides, k_strides, v_strides, dout_strides, i, j, block_n * BLOCK_N, queries,
                              problem, opts, D, DV, Q_PER_KV, BLOCK_N)  # fmt: skip
    # Summed over rows or columns too, where the bias has one
    base = dbias + bias_b.to(tl.int64) * dbias_strides[0] + bias_h.to(tl.int64) * dbias_strides[1]
    i64, j64 = i.to(tl.int64) * dbias_strides[2], j.to(tl.int64) * dbias_strides[3]
    if SUM_Q and SUM_K:
        tile_sum = tl.sum(tl.sum(sums, 1), 0)
        tl.store(base + block_m.to(tl.int64) * dbias_strides[2] + block_n * dbias_strides[3], tile_sum)
    elif SUM_Q:
        tl.store(base + block_m.to(tl.int64) * dbias_strides[2] + j64, tl.sum(sums, 0), mask=j < Skv)
    elif SUM_K:
        tl.store(base + i64 + block_n.to(tl.int64) * dbias_strides[3], tl.sum(sums, 1), mask=i < Sq)
    else:
        tl.store(base + i64[:, None] + j64[None, :], sums, mask=(i < Sq)[:, None] & (j < Skv)[None, :])


@triton.jit
def _tile(
    q, k, v, dout, rows, q_strides, k_strides, v_strides, dout_strides, i, j, first_j, queries, problem, opts, D, DV,
    Q_PER_KV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the scores of queries i and keys j of one head."""
    b, h, Hq, keys = problem.b, problem.h, problem.Hq, problem.keys
    one = tl.full([], 1, tl.int64)
    b64, head, kv_head = b * one, h * one, h // Q_PER_KV * one
    i64, j64 = i.to(tl.int64), j.to(tl.int64)
    valid = i < queries
    q0, q1 = load(q + b64 * q_strides[0] + head * q_strides[1], i64 * q_strides[2], valid, D, True)
    g0, g1 = load(dout + b64 * dout_strides[0] + head * dout_strides[1], i64 * dout_strides[2], valid, DV, True)
    k0, k1 = load(k + b64 * k_strides[0] + kv_head * k_strides[1], j64 * k_strides[2], j < keys, D, True)
    v0, v1 = load(v + b64 * v_strides[0] + kv_head * v_strides[1], j64 * v_strides[2], j < keys, DV, True)
    index = b64 * rows.strides[0] + head * rows.strides[1] + i64
    statistics = load_statistics(rows, index, valid, True)
    keep = None
    if opts.philox is not None:
        keep = dropout_mask(i, b * Hq + h, first_j, opts, BLOCK_N, False)
    inside = valid[:, None] & (j < keys)[None, :]
    _, ds, _ = tile_gradients(
        dot_rows(q0, q1, k0, k1, D), dot_rows(g0, g1, v0, v1, DV), keep, of_rows(statistics), rows, i[:, None], j[None, :], inside,
        problem, opts, True)  # fmt: skip
    return ds
