"""What the backward kernels of attention share: the row statistics that they start from, and the gradients of one tile of scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .scores import LOG2E, clipped, fma, scores, sequence, to_log2, visible
from .tiles import load


class Rows(NamedTuple):
    """fp32 tensors as lse, with (batch, head) strides of their keys_lse2; rows are contiguous. No stride is 1: triton 3.6 takes an argument
    of 1 as a constant, and loses a constant of a nested tuple inside loops."""

    lse2: Any  # log2 of the sum over a row, sink included; inf for a row that sees no key, so that exp2(s - lse2) is 0
    delta: Any  # sum of dout * out, minus dlse where `keys_lse2` is None
    keys_lse2: Any  # log2 of the sum without the sink, inf for an empty row; None unless there are both sinks and dlse
    dlse: Any
    strides: Any


class Statistics(NamedTuple):
    """Those of the rows of a tile, [BM], or spread over its keys; keys_lse2 and dlse mean nothing where Rows.keys_lse2 is None."""

    lse2: Any
    delta: Any
    keys_lse2: Any
    dlse: Any


@triton.jit(do_not_specialize=["Hq", "Sq", "Skv", "blocks"])
def attention_rows(
    out, dout, lse, dlse, dsinks, rows, out_strides, dout_strides, lse_strides, Hq, Sq, Skv, blocks, opts, DV,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Fills `rows` and, with sinks, dsinks [B, blocks, Hq]: each block's part of the gradient, -sum(exp(sink - lse) * dout . out)."""
    block = tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b, h = bh // Hq, (bh % Hq).to(tl.int64)
    first_q, _, queries, _, _ = sequence(opts, b, Sq, Skv)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = i < queries
    row = first_q + i
    b64 = b.to(tl.int64)
    o0, o1 = load(out + b64 * out_strides[0] + h * out_strides[1], row * out_strides[2], valid, DV, True)
    g0, g1 = load(dout + b64 * dout_strides[0] + h * dout_strides[1], row * dout_strides[2], valid, DV, True)
    # delta [BLOCK_M] = sum of dO * O. fp64 for fp32 inputs: dp - delta cancels, entirely so in a row that sees one key, and here precision
    # costs nothing.
    WIDE: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float32 else tl.float32
    delta = tl.sum(o0.to(WIDE) * g0.to(WIDE), 1)
    if DV.second > 0:
        delta += tl.sum(o1.to(WIDE) * g1.to(WIDE), 1)
    delta = delta.to(tl.float32)
    # lse [BLOCK_M] in powers of two, without and with the sink, and the block's part of the sink's gradient
    index = b64 * rows.strides[0] + h * rows.strides[1] + row
    lse_index = b64 * lse_strides[0] + h * lse_strides[1] + row
    keys_lse2 = tl.load(lse + lse_index, mask=valid, other=float("-inf"))
    empty = keys_lse2 == float("-inf")
    keys_lse2 = tl.where(empty, float("inf"), to_log2(tl.where(empty, 0.0, keys_lse2)))
    lse2 = keys_lse2
    if opts.sinks is not None:
        sink = tl.load(opts.sinks + h) * LOG2E
        larger = tl.maximum(tl.where(empty, sink, keys_lse2), sink)
        sum2 = larger + tl.log2(tl.exp2(tl.where(empty, float("-inf"), keys_lse2) - larger) + tl.exp2(sink - larger))
        lse2 = tl.where(empty, float("inf"), sum2)
        tl.store(
            dsinks + bh // Hq * blocks * Hq + block * Hq + h,
            -tl.sum(tl.where(valid, tl.exp2(sink - lse2) * delta, 0.0), 0),
        )
    # dS = P * (dP - delta) + P_keys * dlse, with P_keys normalised without the sink: without one they are equal, and delta takes dlse in
    if dlse is not None:
        g = tl.where(empty, 0.0, tl.load(dlse + lse_index, mask=valid, other=0.0))
        if rows.keys_lse2 is not None:
            tl.store(rows.keys_lse2 + index, keys_lse2, mask=valid)
            tl.store(rows.dlse + index, g, mask=valid)
        else:
            delta -= g
    tl.store(rows.lse2 + index, lse2, mask=valid)
    tl.store(rows.delta + index, tl.where(empty, 0.0, delta), mask=valid)


@triton.jit
def load_statistics(rows, index, valid, CHECK: tl.constexpr):
    """The Statistics of some rows, all of them valid without CHECK."""
    if CHECK:
        lse2 = tl.load(rows.lse2 + index, mask=valid, other=float("inf"))
        delta = tl.load(rows.delta + index, mask=valid, other=0.0)
    else:
        lse2, delta = tl.load(rows.lse2 + index), tl.load(rows.delta + index)
    if rows.keys_lse2 is None:
        return Statistics(lse2, delta, lse2, delta)  # the last two are not used
    elif CHECK:
        keys_lse2 = tl.load(rows.keys_lse2 + index, mask=valid, other=float("inf"))
        return Statistics(lse2, delta, keys_lse2, tl.load(rows.dlse + index, mask=valid, other=0.0))
    else:
        return Statistics(lse2, delta, tl.load(rows.keys_lse2 + index), tl.load(rows.dlse + index))


@triton.jit
def of_rows(x):
    """Statistics as columns [BM, 1], for tiles [queries, keys]."""
    return Statistics(x.lse2[:, None], x.delta[:, None], x.keys_lse2[:, None], x.dlse[:, None])


@triton.jit
def of_columns(x):
    """Statistics as rows [1, BM], for tiles [keys, queries]."""
    return Statistics(x.lse2[None, :], x.delta[None, :], x.keys_lse2[None, :], x.dlse[None, :])


@triton.jit
def tile_gradients(qk, dp, keep, statistics, rows, i, j, inside, problem, opts, MASKED: tl.constexpr):
    """For one tile: the weights after dropout, the gradient of the scores before score_mod, and that of scale * q.k (the same without
    softcap).

    qk = q.k and dp = dout.v; the statistics and i broadcast with j; keep is dropout's mask or None.
    """
    slope = 1.0
    if opts.plain:
        s = qk
        factor = opts.scale_log2
    else:
        s, slope, unmodified = scores(qk, i, j, inside, problem, opts)
        factor = 1.0
    if MASKED:
        s = tl.where(visible(i, j, problem, opts), s, float("-inf"))
    p = tl.exp2(fma(s, factor, -statistics.lse2))
    weights = p
    if keep is not None:
        weights = tl.where(keep, p * opts.dropout_scale, 0.0)
        dp = tl.where(keep, dp * opts.dropout_scale, 0.0)
    ds = p * (dp - statistics.delta)
    if rows.keys_lse2 is not None:
        ds += tl.exp2(fma(s, factor, -statistics.keys_lse2)) * statistics.dlse
    if opts.score_mod is not None:
        i_inside, j_inside = clipped(i, j, problem)
        modified = opts.score_mod_bwd(unmodified, ds, problem.b, problem.h, i_inside, j_inside, opts.aux)
        ds = tl.where(s == float("-inf"), 0.0, modified)  # where ds is 0, a derivative of inf would make it NaN
    return weights, ds, ds * slope


@triton.jit
def query_ranges(first, last, queries, problem, opts, BLOCK: tl.constexpr):
    """As `key_ranges`: which queries see one of the keys first..last, in whole blocks, and which see all of them."""
    keys, offset = problem.keys, problem.offset
    start = 0
    full_start = 0
    end = queries
    full_end = queries
    if opts.has_right:
        start = tl.maximum(first - offset - problem.right, 0) // BLOCK * BLOCK
        full_start = tl.cdiv(tl.maximum(last - offset - problem.right, 0), BLOCK) * BLOCK
    if opts.has_left:
        end = tl.minimum(queries, tl.maximum(tl.minimum(last, keys - 1) - offset + problem.left + 1, 0))
        full_end = tl.minimum(queries, tl.maximum(first - offset + problem.left + 1, 0))
    if last >= keys:
        full_end = 0
    if first >= keys:
        end = 0
    end = tl.maximum(end, start)
    full_start = tl.minimum(full_start, tl.cdiv(end, BLOCK) * BLOCK)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_start)
    return start, full_start, full_end, end
