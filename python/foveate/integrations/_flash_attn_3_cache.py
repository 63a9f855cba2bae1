"""flash_attn_with_kvcache of FlashAttention-3 with the options that version 2 has not."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import foveate
from foveate.integrations._flash_attn_3_operands import FLOAT8, Descales, Result, chunks, descaled, with_qv
from foveate.integrations.flash_attn import _packed
from foveate.integrations.flash_attn.layers.rotary import apply_rotary_emb


class Rotary(NamedTuple):
    """rotary_cos, rotary_sin, rotary_interleaved and rotary_seqlens of a call."""

    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    first: Tensor | None


class _Keys(NamedTuple):
    """Where the keys of each sequence lie: every cache is read as pages of one key."""

    keys: Tensor  # [pages, 1, Hkv, D]
    values: Tensor  # [pages, 1, Hkv, Dv]
    table: Tensor  # [B, keys]
    lens: Tensor  # [B]


@torch.no_grad()
def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, qv: Tensor | None, rotary: Rotary,
    cache_seqlens: int | Tensor | None, cache_batch_idx: Tensor | None, cache_leftpad: Tensor | None, page_table: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k_new: Tensor | None, max_seqlen_q: int | None, descales: Descales,
    scale: float | None, causal: bool, window: tuple[int, int], chunk: int, softcap: float, num_splits: int, return_lse: bool,
) -> Result:  # fmt: skip
    """See `flash_attn_3.flash_attn_with_kvcache`."""
    B, longest_q, page_size = q.shape[0], q.shape[1], k_cache.shape[1]
    if cu_seqlens_q is not None:
        B = cu_seqlens_q.shape[0] - 1
        longest_q = int(_packed.lengths_of(cu_seqlens_q).max()) if max_seqlen_q is None else int(max_seqlen_q)
    if cache_seqlens is None:
        if k is not None or page_table is not None or cache_leftpad is not None:
            raise ValueError(
                "cache_seqlens is None: appending k and v, reading pages, or cache_leftpad needs the length of each sequence"
            )
        cache_seqlens = page_size
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((B,), int(cache_seqlens), dtype=torch.int32, device=q.device)
    start = torch.zeros_like(cache_seqlens) if cache_leftpad is None else cache_leftpad
    cache = _Keys(
        _packed.single_keys(k_cache, "k_cache"), _packed.single_keys(v_cache, "v_cache"),
        _packed.key_table(cache_batch_idx, page_table, page_size, B, start), cache_seqlens - start,
    )  # fmt: skip

    # Rotate q and k, append k and v
    if rotary.cos is not None:
        if k is None or rotary.sin is None:
            raise ValueError(
                "rotary_cos needs rotary_sin, and k and v to append; without them rotate q before the call"
            )
        first = cache_seqlens if rotary.first is None else rotary.first
        one_position = not causal and window == (-1, -1) and chunk <= 0
        q = _rotated(q, rotary.cos, rotary.sin, first, rotary.interleaved, cu_seqlens_q, one_position)
        k = _rotated(k, rotary.cos, rotary.sin, first, rotary.interleaved, cu_seqlens_k_new, False)
    if k is not None and v is not None:
        cache = cache._replace(lens=cache.lens + _append(cache, k, v, cu_seqlens_k_new))

    # Attend, a packed q as padded rows [B, longest_q, Hq, D]
    options = {"causal": causal, "window": window, "softcap": softcap or None, "scale": scale}
    if cu_seqlens_q is None:
        out, lse = _attend(q, qv, cache, descales, chunk, num_splits, options)
    else:
        places = _packed.padded_places(cu_seqlens_q, q.shape[0], longest_q, right=True)
        rows = _packed.pad(q, places, B, longest_q)
        qv = None if qv is None else _packed.pad(qv, places, B, longest_q)
        out, lse = _attend(rows, qv, cache, descales, chunk, num_splits, options)
        out, lse = out.flatten(0, 1)[places], lse.transpose(1, 2).flatten(0, 1)[places].T
    return (out, lse) if return_lse else out


def _attend(
    q: Tensor, qv: Tensor | None, cache: _Keys, descales: Descales, chunk: int, num_splits: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """q [B, Sq, Hq, D] against the cache; on copies of the keys in use where the call over a cache lacks an option."""
    keys, values, table, lens = cache
    plain = qv is None and chunk <= 0 and keys.dtype is q.dtype and q.dtype not in FLOAT8
    if plain and all(descale is None for descale in descales):
        return foveate.attention_with_kv_cache(
            q, keys, values, kv_lens=lens.int(), block_table=table, num_splits=num_splits, return_lse=True, **options
        )
    longest = int(lens.max()) if lens.numel() else 0
    rows = table[:, :longest].long()
    q, k, v, qv = descaled(q, keys[:, 0][rows], values[:, 0][rows], qv, descales)
    q, k = with_qv(q, k, v, qv)
    mask = chunks(chunk, q.shape[1], longest, lens, q.device)
    return foveate.attention(q, k, v, kv_lens=lens.int(), mask=mask, return_lse=True, **options)


def _rotated(
    x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, interleaved: bool, cu_seqlens: Tensor | None, one_position: bool
) -> Tensor:
    """x with the position of each row counted from `first` [B]; one_position: every row of a sequence stands at `first` itself."""
    x = x.to(torch.bfloat16) if x.dtype in FLOAT8 else x
    if one_position:
        if cu_seqlens is not None:
            first = first[_packed.sequence_of(cu_seqlens, x.shape[0])]
            return apply_rotary_emb(x[:, None], cos, sin, interleaved, seqlen_offsets=first)[:, 0]
        row = apply_rotary_emb(x.flatten(1, 2)[:, None], cos, sin, interleaved, seqlen_offsets=first)
        return row[:, 0].unflatten(1, x.shape[1:3])
    return apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=first, cu_seqlens=cu_seqlens)


def _append(cache: _Keys, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor | int:
    """Writes k and v behind the keys of each sequence; the number of new ones."""
    if cu_seqlens is None:
        new: Tensor | int = k.shape[1]
        sequence = torch.arange(k.shape[0], device=k.device).repeat_interleave(k.shape[1])
        place = cache.lens.long()[:, None] + torch.arange(k.shape[1], device=k.device)
        place, k, v = place.flatten(), k.flatten(0, 1), v.flatten(0, 1)
    else:
        new = _packed.lengths_of(cu_seqlens)
        sequence = _packed.sequence_of(cu_seqlens, k.shape[0])
        place = cache.lens.long()[sequence] + _packed.positions_of(cu_seqlens, k.shape[0])
    rows = cache.table.long()[sequence, place]
    cache.keys[rows, 0] = k.to(cache.keys.dtype)
    cache.values[rows, 0] = v.to(cache.values.dtype)
    return new
