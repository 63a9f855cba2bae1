"""Forward attention for sm_90: keys and values come through tensor descriptors (TMA), and with SPECIALIZE a warp of its own loads them for
two groups of warps that compute. For plain scores of half precision, a head dim that is a power of two, and no dropout; what runs is
chosen by `config.forward`, and `attention_forward.py` has everything else.

triton 3.6 specialises one loop of a kernel. With loops for the masked blocks beside it the compiler fails, and with a branch around the
mask it drops the specialisation; so there every block of keys gets the mask if one does, by comparisons with bounds that each row knows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LOG2E, Problem, fma, key_ranges, natural_lse, sequence
from .tiles import dot, store_part, to


@triton.jit
def _step(
    acc, row_max, row_sum, q, keys_at, values_at, first, lowest, highest, opts, BLOCK_N: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Takes the keys from `first` on into acc, row_max and row_sum. A row sees the keys lowest..highest - 1."""
    # S [BLOCK_M, BLOCK_N] = Q K^T, -inf where invisible
    qk = dot(q, tl.trans(keys_at.load([first, 0])), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
    if MASKED:
        step = tl.arange(0, BLOCK_N)[None, :]
        seen = step < (highest - first)[:, None]
        if opts.has_left:
            seen = seen & (step >= (lowest - first)[:, None])
        qk = tl.where(seen, qk, float("-inf"))
    # P = exp2(S - row_max); row_max and row_sum [BLOCK_M] take the new keys in
    new_max = tl.maximum(row_max, tl.max(qk, 1) * opts.scale_log2)
    shift = new_max
    if MASKED:
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(fma(qk, opts.scale_log2, -shift[:, None]))
    rescale = tl.exp2(row_max - shift)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    # acc [BLOCK_M, DV] = acc * rescale + P V
    values = values_at.load([first, 0])
    acc = dot(to(p, values.dtype), values, acc * rescale[:, None])
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["Hq", "Sq", "Skv", "blocks", "left", "right"])
def attention_forward_hopper(
    q, k, v, out, lse, q_strides, k_strides, v_strides, out_strides, lse_strides, Hq, Sq, Skv, blocks, left, right, opts,
    Q_PER_KV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """The arguments of `attention_forward`. RAGGED: a sequence may have a number of keys that is no multiple of BLOCK_N."""
    # The rows of this program: queries i [BLOCK_M] of one head
    block = blocks - 1 - tl.program_id(0) % blocks
    bh = tl.program_id(0) // blocks
    b, h = bh // Hq, bh % Hq
    first_q, first_k, queries, keys, _ = sequence(opts, b, Sq, Skv)
    offset = keys - queries
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)
    b64, head, kv_head = b.to(tl.int64), h.to(tl.int64), (h // Q_PER_KV).to(tl.int64)
    q += b64 * q_strides[0] + first_q * q_strides[2] + head * q_strides[1]
    k += b64 * k_strides[0] + first_k * k_strides[2] + kv_head * k_strides[1]
    v += b64 * v_strides[0] + first_k * v_strides[2] + kv_head * v_strides[1]
    # Rows beyond the last come as zeros. A descriptor of no rows is none, so there is always one; the ranges below do not reach it.
    queries_at = tl.make_tensor_descriptor(q, [tl.maximum(queries, 1), D], [q_strides[2], 1], [BLOCK_M, D])
    keys_at = tl.make_tensor_descriptor(k, [tl.maximum(keys, 1), D], [k_strides[2], 1], [BLOCK_N, D])
    values_at = tl.make_tensor_descriptor(v, [tl.maximum(keys, 1), DV], [v_strides[2], 1], [BLOCK_N, DV])
    rows = queries_at.load([block * BLOCK_M, 0])

    # The keys, by ranges as in `attention_forward`; one range with SPECIALIZE
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    first, last = block * BLOCK_M, tl.minimum(block * BLOCK_M + BLOCK_M, queries) - 1
    problem = Problem(b, h, Hq, keys, offset, left, right)
    start, full_start, full_end, end = key_ranges(first, last, problem, opts, BLOCK_N)
    MASKED: tl.constexpr = opts.has_left or opts.has_right or RAGGED
    lowest = i + offset - left
    highest = tl.zeros([BLOCK_M], tl.int32) + keys
    if opts.has_right:
        highest = tl.minimum(highest, i + offset + right + 1)
    if SPECIALIZE:
        for n in tl.range(start, end, BLOCK_N, warp_specialize=True):
            acc, row_max, row_sum = _step(
                acc, row_max, row_sum, rows, keys_at, values_at, n, lowest, highest, opts, BLOCK_N, MASKED
            )
    else:
        if opts.has_left:
            for n in range(start, full_start, BLOCK_N):
                acc, row_max, row_sum = _step(
                    acc, row_max, row_sum, rows, keys_at, values_at, n, lowest, highest, opts, BLOCK_N, True
                )
        for n in range(full_start, full_end, BLOCK_N):
            acc, row_max, row_sum = _step(
                acc, row_max, row_sum, rows, keys_at, values_at, n, lowest, highest, opts, BLOCK_N, False
            )
        if MASKED:
            for n in range(full_end, end, BLOCK_N):
                acc, row_max, row_sum = _step(
                    acc, row_max, row_sum, rows, keys_at, values_at, n, lowest, highest, opts, BLOCK_N, True
                )

    # lse without the sink, then out [BLOCK_M, DV] = acc / row_sum with it
    valid = i < queries
    if lse is not None:
        some = row_sum > 0
        value = natural_lse(tl.where(some, row_max, 0.0), tl.where(some, row_sum, 1.0))
        index = b64 * lse_strides[0] + head * lse_strides[1] + first_q + i
        tl.store(lse + index, tl.where(some, value, float("-inf")), mask=valid)
    if opts.sinks is not None:
        row_sum += tl.exp2(tl.load(opts.sinks + h) * LOG2E - tl.where(row_max == float("-inf"), 0.0, row_max))
    acc = acc * (1 / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
    out += b64 * out_strides[0] + first_q * out_strides[2] + head * out_strides[1]
    store_part(out, i.to(tl.int64) * out_strides[2], valid, acc, 0, DV, DV)
