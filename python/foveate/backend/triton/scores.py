"""Parts of the attention kernels: what a score is, which keys a row sees, and which of them dropout keeps.

Scores are in powers of two: log2(e) is folded into the scale, so that exp2 does the work of exp. The functions take query and key
indices that broadcast, [BM, 1] with [1, BN] in the kernels that walk over keys, [1, BM] with [BN, 1] in those that walk over queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import INTERPRETED

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Options(NamedTuple):
    """The operands of the scores as the kernels see them; None for those that a call does not have."""

    scale: Any  # float
    scale_log2: Any  # scale * log2(e), rounded once
    softcap: Any  # float
    bias: Any  # [B, Hq, Sq, Skv] by its strides, 0 where it broadcasts
    bias_strides: Any
    mask: Any
    mask_strides: Any
    alibi: Any  # fp32 [B, Hq]
    alibi_stride: Any  # of the batch
    rel: Any  # fp32 [Hq, distances]: the table, looked up for every distance j - (i + L - Sq), the lowest first
    rel_buckets: Any  # int32 [distances], only where the gradient of the table is wanted
    rel_shape: Any  # (distances, index of distance 0)
    sinks: Any  # fp32 [Hq]
    kv_lens: Any  # [B]
    cu_q: Any  # [B + 1]
    cu_k: Any
    totals: Any  # (rows of q, rows of k) that cu_q and cu_k may point into
    philox: Any  # int64 [2]
    dropout_threshold: Any  # round(p * 2**32)
    dropout_scale: Any  # 1 / (1 - p)
    score_mod: Any  # the caller's @triton.jit functions
    score_mod_bwd: Any
    aux: Any  # their tensors
    # Flags, each a tl.constexpr.
    has_left: Any
    has_right: Any
    plain: Any  # the score is scale * q.k with scale > 0: the scale is applied inside exp2
    guarded: Any  # a row may see no key of a block that the geometry shows it: there is a mask, or a bias of -inf


class Problem(NamedTuple):
    """One head of one sequence, as the device functions see it. Kernels make it of what `sequence` gives."""

    b: Any
    h: Any  # or [BM, 1], where the rows of a tile are of several heads
    Hq: Any
    keys: Any
    offset: Any  # keys - queries: query i stands at key i + offset
    left: Any  # the window: how far a query sees to either side; read if opts.has_left
    right: Any  # read if opts.has_right


@triton.jit
def to_log2(lse):
    """lse * log2(e) with one rounding: an error of a row's sum is an error of all its weights, and one product in fp64 costs nothing."""
    return (lse.to(tl.float64) * LOG2E).to(tl.float32)


@triton.jit
def natural_lse(row_max, row_sum):
    """(row_max + log2(row_sum)) * ln(2)"""
    return ((row_max.to(tl.float64) + tl.log2(row_sum).to(tl.float64)) * LN2).to(tl.float32)


@triton.jit
def fma(a, b, c):
    """a * b + c with one rounding: a GPU fuses the two, the interpreter does not."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return a * b + c


@triton.jit
def tanh(x):
    """By exp2; near 0, where 1 - exp2(...) would cancel, by its series, whose next term is below 1e-8."""
    e = tl.exp2(-2 * LOG2E * tl.abs(x))
    far = (1 - e) / (1 + e)
    y = x * x
    near = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def clamped(x, largest):
    """x, int32 or int64, within 0..largest: int64."""
    return tl.minimum(tl.maximum(x.to(tl.int64), 0), largest)


@triton.jit
def _span(cu, total, longest):
    """First row and length of the sequence between two entries of cu_seqlens."""
    first = clamped(tl.load(cu), total)
    end = clamped(tl.load(cu + 1), total)
    return first, tl.minimum(tl.maximum(end - first, 0), longest).to(tl.int32)


@triton.jit
def sequence(opts, b, Sq, Skv):
    """Where sequence b lies: its first row in q and in k, the number of queries, of keys, and of rows of k that belong to it.

    Lengths on a GPU are not checked by the host. What lies outside the tensors is cut off here, so no value makes a kernel leave them.
    """
    if opts.cu_q is not None:
        first_q, queries = _span(opts.cu_q + b, opts.totals[0], Sq)
        first_k, keys = _span(opts.cu_k + b, opts.totals[1], Skv)
        rows = keys
    else:
        first_q = tl.zeros([], tl.int64)
        first_k = first_q
        queries = Sq
        keys = Skv
        rows = Skv
        if opts.kv_lens is not None:
            keys = clamped(tl.load(opts.kv_lens + b), Skv).to(tl.int32)
    return first_q, first_k, queries, keys, rows


@triton.jit
def visible(i, j, problem, opts):
    seen = j < problem.keys
    if opts.has_left:
        seen = seen & (j >= i + problem.offset - problem.left)
    if opts.has_right:
        seen = seen & (j <= i + problem.offset + problem.right)
    return seen


@triton.jit
def key_ranges(first, last, problem, opts, BLOCK: tl.constexpr):
    """start <= full_start <= full_end <= end, multiples of BLOCK: keys outside start..end are seen by none of the queries first..last,
    keys in full_start..full_end by all."""
    keys, offset = problem.keys, problem.offset
    start = 0
    full_start = 0
    end = keys
    full_end = keys
    if opts.has_left:
        start = tl.maximum(first + offset - problem.left, 0) // BLOCK * BLOCK
        full_start = tl.cdiv(tl.maximum(last + offset - problem.left, 0), BLOCK) * BLOCK
    if opts.has_right:
        end = tl.minimum(keys, last + offset + problem.right + 1)
        full_end = tl.minimum(keys, tl.maximum(first + offset + problem.right + 1, 0))
    end = tl.maximum(end, start)
    full_start = tl.minimum(full_start, tl.cdiv(end, BLOCK) * BLOCK)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_start)
    return start, full_start, full_end, end


@triton.jit
def scores(qk, i, j, inside, problem, opts):
    """The scores of q.k, their derivative by scale * q.k up to score_mod (1 without softcap), and what score_mod was given. inside:
    where bias and mask may be read."""
    # What is added comes first, so that the scaled product, often the largest term, is added to it without a rounding of its own.
    b, h, offset = problem.b, problem.h, problem.offset
    added = 0.0
    if opts.alibi is not None:
        alibi = tl.load(opts.alibi + b * opts.alibi_stride + h) * -LOG2E
        added = alibi * tl.abs(i + offset - j).to(tl.float32)
    if opts.rel is not None:
        index = h * opts.rel_shape[0] + (j - i - offset + opts.rel_shape[1])
        added = fma(tl.load(opts.rel + index, mask=inside, other=0.0), LOG2E, added)
    if opts.bias is not None:
        bias = tl.load(_element(opts.bias, opts.bias_strides, b, h, i, j), mask=inside, other=0.0)
        added = fma(bias.to(tl.float32), LOG2E, added)
    slope = 1.0
    if opts.softcap is not None:
        t = tanh(qk * (opts.scale / opts.softcap))
        slope = 1 - t * t
        s = fma(t, opts.softcap * LOG2E, added)
    else:
        s = fma(qk, opts.scale_log2, added)
    unmodified = s
    if opts.score_mod is not None:
        unmodified = s * LN2
        i_inside, j_inside = clipped(i, j, problem)
        s = opts.score_mod(unmodified, b, h, i_inside, j_inside, opts.aux) * LOG2E
    if opts.mask is not None:
        keep = tl.load(_element(opts.mask, opts.mask_strides, b, h, i, j), mask=inside, other=0)
        s = tl.where(keep != 0, s, float("-inf"))
    return s, slope, unmodified


@triton.jit
def clipped(i, j, problem):
    """Query and key indices of tiles that reach beyond the last ones: a score_mod may use them as addresses."""
    return tl.minimum(i, problem.keys - problem.offset - 1), tl.minimum(j, problem.keys - 1)


@triton.jit
def _element(base, strides, b, h, i, j):
    b, h, i, j = (b * tl.full([], 1, tl.int64), h * tl.full([], 1, tl.int64), i.to(tl.int64), j.to(tl.int64))
    return base + (b * strides[0] + h * strides[1] + i * strides[2] + j * strides[3])


@triton.jit
def dropout_mask(i, bh, first_key, opts, BLOCK: tl.constexpr, KEYS_FIRST: tl.constexpr):
    """Dropout's mask for queries i [BM], whose b * Hq + h is bh (one number or [BM]), and the keys first_key to first_key + BLOCK - 1:
    [BM, BLOCK], or [BLOCK, BM] with KEYS_FIRST. One call of Philox makes the words of four keys."""
    seed = tl.load(opts.philox)
    stream = (tl.load(opts.philox + 1) & 0xFFFFFFFF).to(tl.uint32)
    quad = first_key // 4 + tl.arange(0, BLOCK // 4)
    ones = tl.full([i.shape[0]], 1, tl.int32)
    if KEYS_FIRST:
        zero = quad[:, None] * 0 + i[None, :] * 0
        w0, w1, w2, w3 = tl.philox(seed, zero + quad[:, None], zero + i[None, :], zero + (bh * ones)[None, :], stream)
    else:
        zero = quad[None, :] * 0 + i[:, None] * 0
        w0, w1, w2, w3 = tl.philox(seed, zero + quad[None, :], zero + i[:, None], zero + (bh * ones)[:, None], stream)
    words = tl.join(
        tl.join(w0, w2), tl.join(w1, w3)
    )  # the last two dimensions are the bits of the lane, high bit first
    if KEYS_FIRST:
        words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), [BLOCK, i.shape[0]])
    else:
        words = tl.reshape(words, [i.shape[0], BLOCK])
    return words.to(tl.int64) >= opts.dropout_threshold
