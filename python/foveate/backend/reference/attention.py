"""Plain torch definition of attention: the meaning that every faster backend must reproduce.

Differentiable by autograd on any device, O(Sq * Skv) memory. Half-precision inputs are computed in fp32, fp64 stays
fp64; the output is rounded once at the end. Nothing here checks its arguments: the public functions do.
Dimension letters: B batch, Sq/Skv query/key length, Hq/Hkv query/KV heads, D head dim of q and k, Dv head dim of v.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .rows import compute_dtype, rotate, safe_softmax

_LOW32 = 0xFFFFFFFF
# Round multipliers and Weyl key increments (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def relative_buckets(distances: Tensor, num_buckets: int, bidirectional: bool, max_distance: int) -> Tensor:
    """T5's bucket of each distance, key position minus query position (Raffel et al. 2020). int64 in, int64 out.

    With bidirectional, keys after the query use the upper half of the buckets; without it they share bucket 0 with
    distance 0. Of the buckets of one side the first half is one bucket per distance, the rest grows logarithmically up
    to max_distance, and every distance from there on shares the last.
    """
    if bidirectional:
        num_buckets //= 2
    exact = num_buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"relative bias has {num_buckets} buckets for each direction and max_distance={max_distance}; "
            "it needs at least 2 buckets and a max_distance beyond half of them"
        )
    n = distances.abs() if bidirectional else (-distances).clamp(min=0)
    # fp32 and in this order of operations: checkpoints were trained with these roundings at the bucket borders.
    log_ratio = torch.log(n.to(torch.float32) / exact) / math.log(max_distance / exact)
    # log(0) = -inf is converted below; its int64 value is arbitrary and never selected.
    grown = exact + (log_ratio * (num_buckets - exact)).to(torch.int64)
    bucket = torch.where(n < exact, n, grown.clamp(max=num_buckets - 1))
    if bidirectional:
        bucket = bucket + torch.where(distances > 0, num_buckets, 0)
    return bucket


def _multiply_high_low(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * m for a, m < 2**32, without leaving the range of int64."""
    high, low = a * (m >> 16), a * (m & 0xFFFF)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _LOW32


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """Philox-4x32-10. Words are int64 tensors holding 32-bit values and broadcast; returns int64 [..., 4]."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply_high_low(c0, _PHILOX_M[0])
        high1, low1 = _multiply_high_low(c2, _PHILOX_M[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_W[0]) & _LOW32, (k1 + _PHILOX_W[1]) & _LOW32
    return torch.stack([c0, c1, c2, c3], -1)


def philox_keep(philox: Tensor, p: float, B: int, H: int, Sq: int, Skv: int, first_batch: int = 0) -> Tensor:
    """bool [B, H, Sq, Skv], True where dropout with probability p keeps the weight.

    philox: int64 [2], seed and offset. key = the seed's low and high 32 bits; counter = (j // 4, i, b * H + h, offset's
    low 32 bits), lane j % 4; kept where the 32-bit word >= round(p * 2**32). b counts from first_batch.
    """
    device = philox.device
    seed, offset = philox[0], philox[1]
    quad = torch.arange((Skv + 3) // 4, device=device)
    i = torch.arange(Sq, device=device)[:, None]
    bh = torch.arange(first_batch * H, (first_batch + B) * H, device=device).view(B, H, 1, 1)
    words = philox4x32((quad, i, bh, offset & _LOW32), (seed & _LOW32, (seed >> 32) & _LOW32))
    return words.flatten(-2)[..., :Skv] >= round(p * 2**32)


def distances(rows: Tensor, Sq: int, Skv: int, kv_lens: Tensor | None) -> tuple[Tensor, Tensor]:
    """j - (i + L - Sq) of queries `rows` among Sq and keys 0..Skv - 1, and whether j < L, with L = kv_lens[b] or Skv.

    rows: int64 [R] or [B, R]. Returns int64 [B or 1, 1, R, Skv] and bool [B or 1, 1, 1, Skv].
    """
    j = torch.arange(Skv, device=rows.device)
    lens = torch.full((1,), Skv, device=rows.device) if kv_lens is None else kv_lens.to(rows.device, torch.int64)
    lens = lens[:, None, None, None]
    i = (rows[None] if rows.dim() == 1 else rows)[:, None, :, None]
    return j - (i + lens - Sq), j < lens


def masked_scores(
    s: Tensor, distance: Tensor, inside: Tensor, *, causal: bool, window: tuple[int, int], softcap: float | Tensor, bias: Tensor | None,
    mask: Tensor | None, alibi_slopes: Tensor | None, rel_table: Tensor | None, rel_bidirectional: bool, rel_max_distance: int,
) -> Tensor:  # fmt: skip
    """scale * q.k [B, Hq, R, Skv] after softcap, ALiBi, bias and relative bias, and -inf where the key is not visible.

    distance, inside: as `distances` gives them; the options are those of `attention` for these rows.
    """
    if isinstance(softcap, Tensor) or softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[..., None, None] * distance.abs()
    if bias is not None:
        s = s + bias.to(s.dtype)
    if rel_table is not None:
        buckets = relative_buckets(distance.squeeze(1), rel_table.shape[0], rel_bidirectional, rel_max_distance)
        s = s + rel_table.to(s.dtype)[buckets].movedim(-1, 1)  # [B or 1, R, Skv, Hq] -> [B or 1, Hq, R, Skv]
    left, right = window
    if causal:
        right = 0 if right < 0 else min(right, 0)
    visible = inside
    if left >= 0:
        visible = visible & (distance >= -left)
    if right >= 0:
        visible = visible & (distance <= right)
    if mask is not None:
        visible = visible & mask
    return torch.where(visible, s, float("-inf"))


def with_sinks(s: Tensor, sinks: Tensor) -> Tensor:
    """s [B, Hq, R, Skv] with the logit of each head's sink, sinks [Hq], as one more column."""
    B, Hq, R, _ = s.shape
    return torch.cat([s, sinks.to(s.dtype).view(1, Hq, 1, 1).expand(B, -1, R, 1)], -1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float,
    softcap: float | Tensor = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    rel_table: Tensor | None = None,
    rel_bidirectional: bool = True,
    rel_max_distance: int = 128,
    sinks: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q @ k.T, capped, biased and masked) @ v, and the log-sum-exp of the scores.

    q: [B, Sq, Hq, D]; k: [B, Skv, Hkv, D]; v: [B, Skv, Hkv, Dv]; Hkv divides Hq. Returns out [B, Sq, Hq, Dv] in q's
    dtype and lse [B, Hq, Sq] (natural log, without the sink) in the compute dtype.

    s = scale * q.k; with softcap > 0, s = softcap * tanh(s / softcap); then
    s += -slope * |distance| + bias + rel_table[bucket(distance)], where distance = j - (i + L - Sq) and L = kv_lens[b],
    or Skv without kv_lens. Key j is visible if j < L, mask is True, distance <= 0 with causal, and -left <= distance <=
    right with window (-1: no limit). The sink logit is one more column of the softmax, without a value. Dropout scales
    the kept weights by 1 / (1 - p); its random words are those of `philox_keep`.
    A row that sees no key gives out 0, lse -inf and zero gradients. Keys and values from L on are never used, NaN or
    not.
    """
    dtype = compute_dtype(q)
    B, Sq, Hq, _ = q.shape
    Skv, Hkv = k.shape[1], k.shape[2]
    distance, inside = distances(torch.arange(Sq, device=q.device), Sq, Skv, kv_lens)
    qc, kc, vc = q.to(dtype), k.to(dtype), v.to(dtype)
    if kv_lens is not None:
        # 0 * NaN is NaN, so what lies beyond kv_lens has to go before the products.
        keys = inside.view(B, Skv, 1, 1)
        kc, vc = torch.where(keys, kc, 0.0), torch.where(keys, vc, 0.0)
    kc, vc = (t.repeat_interleave(Hq // max(Hkv, 1), dim=2) for t in (kc, vc))
    s = masked_scores(
        scale * torch.einsum("bihd,bjhd->bhij", qc, kc), distance, inside, causal=causal, window=window, softcap=softcap, bias=bias,
        mask=mask, alibi_slopes=alibi_slopes, rel_table=rel_table, rel_bidirectional=rel_bidirectional, rel_max_distance=rel_max_distance,
    )  # fmt: skip
    p, lse = safe_softmax(s)
    if sinks is not None:
        p = safe_softmax(with_sinks(s, sinks))[0][..., :Skv]
    if dropout_p > 0:
        if philox is None:
            raise ValueError(f"dropout_p={dropout_p} needs philox, the seed and the offset that its mask is drawn from")
        keep = philox_keep(philox.to(q.device), dropout_p, B, Hq, Sq, Skv, first_batch)
        p = torch.where(keep, p, 0.0) / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", p, vc).to(q.dtype), lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`attention` of each of the packed sequences by itself.

    q: [total_q, Hq, D]; k, v: [total_k, Hkv, D or Dv]; cu_seqlens: int32 [B + 1], sequence b is rows cu[b]:cu[b + 1].
    Options are those of `attention` without mask, bias and kv_lens. In ALiBi [B, Hq] and in the dropout's counter b is
    the sequence, i and j are positions in it. Returns out [total_q, Hq, Dv] and lse [Hq, total_q].
    """
    outs, lses = [q.new_empty(0, q.shape[1], v.shape[2])], [q.new_empty(q.shape[1], 0, dtype=compute_dtype(q))]
    cu_q, cu_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        out, lse = attention(q[None, rows], k[None, keys], v[None, keys], alibi_slopes=slopes, first_batch=b, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the attention over each.

    out: [B, Sq, H, Dv] with lse [B, H, Sq], or [total, H, Dv] with [H, total]. lse = log(exp(lse_a) + exp(lse_b)) and
    out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b. A row that is empty in both stays 0 and -inf.
    """
    weights, lse = safe_softmax(torch.stack([lse_a, lse_b], -1))
    weight_a, weight_b = weights.transpose(-3, -2).unbind(-1)  # [(B,) Sq, H]
    dtype = compute_dtype(out_a)
    out = weight_a[..., None].to(dtype) * out_a.to(dtype) + weight_b[..., None].to(dtype) * out_b.to(dtype)
    return out.to(out_a.dtype), lse


_QUANTIZED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def _store(cache: Tensor, slots: tuple[Tensor, Tensor], x: Tensor, scale: Tensor | float | None) -> None:
    """Writes x [n, Hkv, D] to cache[slots], rounded to nearest even; scale as in `attention_with_kv_cache`."""
    if cache.dtype not in _QUANTIZED_MAX:
        cache[slots] = x.to(cache.dtype)
        return
    limit = _QUANTIZED_MAX[cache.dtype]
    x = x.to(torch.float32)
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    if scale.dim() > 1:
        scale[slots] = x.abs().amax(-1) / limit
        scale = scale[slots]
    scale = scale[..., None]
    x = torch.where(scale == 0, 0.0, x / scale).clamp(-limit, limit)
    x = x.round().to(torch.int8) if cache.dtype == torch.int8 else x.to(cache.dtype)
    cache.view(_bits(cache))[slots] = x.view(_bits(cache))


def _load(cache: Tensor, slots: tuple[Tensor, Tensor], scale: Tensor | float | None, dtype: torch.dtype) -> Tensor:
    """cache[slots] as [n, Hkv, D] in dtype, times its scale."""
    x = cache.view(_bits(cache))[slots].view(cache.dtype).to(dtype)
    if cache.dtype not in _QUANTIZED_MAX:
        return x
    scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    return x * (scale[slots] if scale.dim() > 1 else scale)[..., None].to(dtype)


def _bits(cache: Tensor) -> torch.dtype:
    """The dtype to index the cache in: torch has no indexing for fp8 on every device."""
    return torch.uint8 if cache.dtype == torch.float8_e4m3fn else cache.dtype


@torch.no_grad()
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    kv_lens: Tensor,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: tuple[int, int] = (-1, -1),
    scale: float,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
) -> tuple[Tensor, Tensor]:
    """Appends k and v to the cache IN PLACE, then attends from q to the kv_lens[b] + Snew keys of each sequence.

    q: [B, Sq, Hq, D]; k, v: [B, Snew, Hkv, D or Dv] or None (Snew = 0); kv_lens: int [B], the keys already there.
    k_cache, v_cache: [B, Smax, Hkv, D or Dv], or pages [pages, page_size, Hkv, D or Dv] with block_table int32
    [B, max_pages], where position t of sequence b lies in page block_table[b, t // page_size], row t % page_size.
    rotary_cos, rotary_sin: [max_pos, rot / 2]; k row i is rotated by position kv_lens[b] + i before it is stored, and q
    row i by kv_lens[b] + i, without k by kv_lens[b] - Sq + i.
    An int8 or float8_e4m3fn cache holds value / scale, rounded to nearest even and clamped. k_scale, v_scale: fp32, one
    number, [Hkv], or one for each token and head, cache.shape[:-1]; the last kind is written at append as max|x| / 127
    (int8) or max|x| / 448 (fp8), and a token of zeros stores scale 0 and zeros.
    Causal is bottom-right over all kv_lens[b] + Snew keys. Other options as in `attention`. Returns out [B, Sq, Hq, Dv]
    and lse [B, Hq, Sq]. No gradient.
    """
    B, Sq, Hq, _ = q.shape
    Snew = 0 if k is None else k.shape[1]
    dtype = compute_dtype(q)
    page_size = k_cache.shape[1]

    def slots(b: int, start: int, end: int) -> tuple[Tensor, Tensor]:
        t = torch.arange(start, end, device=k_cache.device)
        if block_table is None:
            return torch.full_like(t, b), t
        return block_table[b].to(torch.int64)[t // page_size], t % page_size

    def rotated(x: Tensor, start: int) -> Tensor:
        if rotary_cos is None or rotary_sin is None:
            return x.to(dtype)
        here = slice(start, start + x.shape[1])
        return rotate(x, rotary_cos[here], rotary_sin[here], rotary_interleaved)

    lens = kv_lens.tolist()
    # Append everything before attending, as a kernel does that cannot order its sequences.
    if k is not None and v is not None:
        for b in range(B):
            new = slots(b, lens[b], lens[b] + Snew)
            _store(k_cache, new, rotated(k[b : b + 1], lens[b])[0], k_scale)
            _store(v_cache, new, v[b].to(dtype), v_scale)

    outs, lses = [q.new_empty(0, Sq, Hq, v_cache.shape[-1])], [q.new_empty(0, Hq, Sq, dtype=dtype)]
    for b in range(B):
        used = slots(b, 0, lens[b] + Snew)
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        out, lse = attention(
            rotated(q[b : b + 1], lens[b] if Snew else lens[b] - Sq),
            _load(k_cache, used, k_scale, dtype)[None],
            _load(v_cache, used, v_scale, dtype)[None],
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            alibi_slopes=slopes,
            sinks=sinks,
        )
        outs.append(out.to(q.dtype))
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)
