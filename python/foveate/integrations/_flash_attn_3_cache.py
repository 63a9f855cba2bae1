"""flash_attn_with_kvcache of FlashAttention-3 with the options that version 2 has not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.integrations import flash_attn_3 as interface
from foveate.integrations.flash_attn import _packed
from foveate.integrations.flash_attn._options import Window, window_of
from foveate.integrations.flash_attn.layers.rotary import apply_rotary_emb


@torch.no_grad()
def attend(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    qv: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    page_table: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k_new: Tensor | None,
    max_seqlen_q: int | None,
    rotary_seqlens: Tensor | None,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    attention_chunk: int,
    softcap: float,
    rotary_interleaved: bool,
    num_splits: int,
    return_softmax_lse: bool,
    **tuning: Any,
) -> Any:
    """See `flash_attn_3.flash_attn_with_kvcache`. Every cache is read as pages of one key."""
    # Where each sequence's keys lie: table [B, keys] of pages of one key, lens [B]
    B = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    page_size, device, window = k_cache.shape[1], q.device, window_of(window_size)
    if cache_seqlens is None:
        if k is not None or page_table is not None or cache_leftpad is not None:
            raise ValueError(
                "cache_seqlens is None: appending k and v, reading pages, or cache_leftpad needs the length of each sequence"
            )
        cache_seqlens = page_size
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((B,), int(cache_seqlens), dtype=torch.int32, device=device)
    start = torch.zeros_like(cache_seqlens) if cache_leftpad is None else cache_leftpad
    table = _packed.key_table(cache_batch_idx, page_table, page_size, B, start)
    keys, values = _packed.single_keys(k_cache, "k_cache"), _packed.single_keys(v_cache, "v_cache")
    lens = cache_seqlens - start
    first = cache_seqlens if rotary_seqlens is None else rotary_seqlens

    # Rotate q and k, append k and v
    longest_q = q.shape[1]
    if cu_seqlens_q is not None:
        longest_q = int(_packed.lengths_of(cu_seqlens_q).max()) if max_seqlen_q is None else int(max_seqlen_q)
    if rotary_cos is not None:
        if k is None or rotary_sin is None:
            raise ValueError(
                "rotary_cos needs rotary_sin, and k and v to append; without them rotate q before the call"
            )
        one_position = not causal and window == (-1, -1) and attention_chunk <= 0
        q = _rotated(q, rotary_cos, rotary_sin, first, rotary_interleaved, cu_seqlens_q, one_position)
        k = _rotated(k, rotary_cos, rotary_sin, first, rotary_interleaved, cu_seqlens_k_new, False)
    if k is not None and v is not None:
        new = _append(keys, values, k, v, table, lens, cu_seqlens_k_new)
        lens = lens + new

    # Attend, a packed q as padded rows [B, longest_q, Hq, D]; in plain gathers where the cache's call lacks an option
    places = None
    if cu_seqlens_q is not None:
        places = _packed.padded_places(cu_seqlens_q, q.shape[0], longest_q, right=True)
        q = _packed.pad(q, places, B, longest_q)
        qv = None if qv is None else _packed.pad(qv, places, B, longest_q)
    plain = qv is None and attention_chunk <= 0 and keys.dtype is q.dtype and q.dtype not in interface._FLOAT8
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap or None, "scale": softmax_scale}
    if plain and q_descale is None and k_descale is None and v_descale is None:
        out, lse = foveate.attention_with_kv_cache(
            q, keys, values, kv_lens=lens.int(), block_table=table, num_splits=num_splits, return_lse=True, **options
        )
    else:
        longest = int(lens.max()) if lens.numel() else 0
        rows = table[:, :longest].long()
        descales = (q_descale, k_descale, v_descale)
        q, own, v_own, qv = interface._descaled(q, keys[:, 0][rows], values[:, 0][rows], qv, descales)
        q, own = interface._with_qv(q, own, v_own, qv)
        mask = interface._chunks(attention_chunk, q.shape[1], longest, lens, device)
        out, lse = foveate.attention(q, own, v_own, kv_lens=lens.int(), mask=mask, return_lse=True, **options)
    if places is not None:
        out, lse = out.flatten(0, 1)[places], lse.transpose(1, 2).flatten(0, 1)[places].T
    return (out, lse) if return_softmax_lse else out


def _rotated(
    x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, interleaved: bool, cu_seqlens: Tensor | None, one_position: bool
) -> Tensor:
    x = x.to(torch.bfloat16) if x.dtype in interface._FLOAT8 else x
    if one_position:
        if cu_seqlens is not None:
            first = first[_packed.sequence_of(cu_seqlens, x.shape[0])]
            return apply_rotary_emb(x[:, None], cos, sin, interleaved, seqlen_offsets=first)[:, 0]
        row = apply_rotary_emb(x.flatten(1, 2)[:, None], cos, sin, interleaved, seqlen_offsets=first)
        return row[:, 0].unflatten(1, x.shape[1:3])
    return apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=first, cu_seqlens=cu_seqlens)


def _append(
    keys: Tensor, values: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, cu_seqlens: Tensor | None
) -> Tensor | int:
    """Writes k and v behind the keys of each sequence; the number of new ones."""
    if cu_seqlens is None:
        new: Tensor | int = k.shape[1]
        sequence = torch.arange(k.shape[0], device=k.device).repeat_interleave(k.shape[1])
        place = lens.long()[:, None] + torch.arange(k.shape[1], device=k.device)
        place, k, v = place.flatten(), k.flatten(0, 1), v.flatten(0, 1)
    else:
        new = _packed.lengths_of(cu_seqlens)
        sequence = _packed.sequence_of(cu_seqlens, k.shape[0])
        place = lens.long()[sequence] + _packed.positions_of(cu_seqlens, k.shape[0])
    rows = table.long()[sequence, place]
    keys[rows, 0] = k.to(keys.dtype)
    values[rows, 0] = v.to(values.dtype)
    return new
