"""FlashAttention-3's functions, the module flash_attn_interface of its package, on every device and dtype of foveate.

    from foveate.integrations.flash_attn_3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

Shapes, causal, window_size and softcap as in `foveate.integrations.flash_attn`. More than there:
qv [.., Hq, Dv]: scores = softmax_scale * (q.k + qv.v), softmax_scale (D + Dv)**-0.5 by default. q_descale, k_descale, v_descale [B, Hkv]:
factors of q, k and v, which may be float8; they are multiplied into copies. attention_chunk: a query sees keys of its own chunk of so
many positions only; that takes a mask of one byte for each query and key. Results have q's dtype, bfloat16 for float8.
num_splits, pack_gqa, sm_margin and scheduler_metadata tune FlashAttention-3's schedule and never change a result: num_splits goes to the
decode kernel, the others say nothing to foveate's. return_attn_probs=True and return_softmax_lse=True give (out, lse).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.integrations import _flash_attn_3_cache
from foveate.integrations._flash_attn_3_operands import FLOAT8, Result, chunks, descaled, with_qv
from foveate.integrations.flash_attn import _packed, flash_attn_interface
from foveate.integrations.flash_attn._options import Window, window_of

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """q [B, Sq, Hq, D]; k [B, Sk, Hkv, D]; v [B, Sk, Hkv, Dv] -> out [B, Sq, Hq, Dv], or (out, lse [B, Hq, Sq])."""
    q, k, v, qv = descaled(q, k, v, qv, (q_descale, k_descale, v_descale))
    q, k = with_qv(q, k, v, qv)
    mask = chunks(attention_chunk, q.shape[1], k.shape[1], None, q.device)
    return foveate.attention(
        q, k, v, causal=causal, window=window_of(window_size), softcap=softcap or None, scale=softmax_scale, mask=mask,
        deterministic=deterministic, return_lse=return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [B, S, 3, H, D], or [B, S, Hq + 2 Hkv, D] with num_heads_q = Hq; the rest as `flash_attn_func`."""
    if qkv.dim() == 5:
        q, k, v = flash_attn_interface._unpack(qkv, "qkv", 3)
    elif num_heads_q is None:
        raise ValueError(f"qkv has shape {list(qkv.shape)}: without a dimension of 3 it needs num_heads_q")
    else:
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, heads_k, heads_k], 2)
    return flash_attn_func(
        q, k, v, softmax_scale, causal, None, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap,
        deterministic=deterministic, return_attn_probs=return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """q [total_q, Hq, D]; k, v [total_k, Hkv, D or Dv]; cu_seqlens int32 [B + 1] -> out [total_q, Hq, Dv], or (out, lse [Hq, total_q]).

    seqused_q, seqused_k [B]: only so many rows of each sequence count; the others are never read, and their outputs are 0 (lse -inf).
    With them the rows in use are copied, and their number is read back to the host; with attention_chunk the batch is padded.
    """
    total_q = q.shape[0]
    descales = (q_descale, k_descale, v_descale)
    if any(x is not None for x in descales) or q.dtype in FLOAT8:
        of_q, of_k = _packed.sequence_of(cu_seqlens_q, total_q), _packed.sequence_of(cu_seqlens_k, k.shape[0])
        q, k, v, qv = descaled(q, k, v, qv, descales, of_q, of_k)
    q, k = with_qv(q, k, v, qv)
    rows = None
    if seqused_q is not None:
        rows, cu_seqlens_q = _packed.used_rows(cu_seqlens_q, seqused_q, total_q)
        q = q[rows]
    if seqused_k is not None:
        rows_k, cu_seqlens_k = _packed.used_rows(cu_seqlens_k, seqused_k, k.shape[0])
        k, v = k[rows_k], v[rows_k]
    options: dict[str, Any] = {
        "causal": causal, "window": window_of(window_size), "softcap": softcap or None, "scale": softmax_scale,
        "deterministic": deterministic, "return_lse": True,
    }  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    if attention_chunk > 0:
        out, lse = _padded(q, k, v, *lengths, attention_chunk, options)
    else:
        out, lse = foveate.attention_varlen(q, k, v, *lengths, **options)
    if rows is not None:
        out = out.new_zeros(total_q, *out.shape[1:]).index_put((rows,), out)
        lse = lse.new_full((total_q, lse.shape[0]), float("-inf")).index_put((rows,), lse.T).T
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Result:
    """Appends k, v in place at cache_seqlens (after rotary), then attends q to the cache, as in version 2. No backward.

    page_table is version 2's block_table; with cache_batch_idx, that chooses its rows. cu_seqlens_q [B + 1] with max_seqlen_q: q is packed
    [total_q, Hq, D], and so are out and lse [Hq, total_q]; cu_seqlens_k_new: k and v are packed. rotary_seqlens [B]: the position of
    the first new row where it is not cache_seqlens. qv, attention_chunk, descales and float8 caches copy the keys in use out of the cache.
    """
    odd = (qv, cu_seqlens_q, cu_seqlens_k_new, rotary_seqlens, q_descale, k_descale, v_descale)
    if page_table is not None and cache_batch_idx is not None:
        page_table, cache_batch_idx = page_table[cache_batch_idx.long()], None
    if all(x is None for x in odd) and attention_chunk <= 0 and k_cache.dtype not in FLOAT8:
        return flash_attn_interface.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, page_table,
            softmax_scale, causal, window_size, softcap, rotary_interleaved, None, num_splits, return_softmax_lse,
        )  # fmt: skip
    return _flash_attn_3_cache.attend(
        q, k_cache, v_cache, k, v, qv, _flash_attn_3_cache.Rotary(rotary_cos, rotary_sin, rotary_interleaved, rotary_seqlens),
        cache_seqlens, cache_batch_idx, cache_leftpad, page_table, cu_seqlens_q, cu_seqlens_k_new, max_seqlen_q,
        (q_descale, k_descale, v_descale), softmax_scale, causal, window_of(window_size), attention_chunk, softcap, num_splits,
        return_softmax_lse,
    )  # fmt: skip


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The union of attention over disjoint sets of keys: out [splits, B, S, H, D], lse [splits, B, S, H] -> ([B, S, H, D], [B, S, H])."""
    lse = torch.logsumexp(lse_partial.float(), 0)
    shares = torch.exp(lse_partial.float() - torch.where(lse.isinf(), 0.0, lse))
    whole = (shares[..., None] * out_partial.float()).sum(0).to(out_dtype or out_partial.dtype)
    return (whole if out is None else out.copy_(whole)), lse


def get_scheduler_metadata(*args: Any, **kwargs: Any) -> None:
    """None: foveate's kernels plan their work when they are called."""


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    chunk: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Packed sequences with a mask: queries padded before their first, keys behind their last, so that the last meet."""
    B = cu_q.shape[0] - 1
    places = _packed.padded_places(cu_q, q.shape[0], max_q, right=True)
    places_k = _packed.padded_places(cu_k, k.shape[0], max_k, right=False)
    kv_lens = _packed.lengths_of(cu_k)
    mask = chunks(chunk, max_q, max_k, kv_lens, q.device)
    padded = (_packed.pad(q, places, B, max_q), _packed.pad(k, places_k, B, max_k), _packed.pad(v, places_k, B, max_k))
    out, lse = foveate.attention(*padded, kv_lens=kv_lens, mask=mask, **options)
    return out.flatten(0, 1)[places], lse.transpose(1, 2).flatten(0, 1)[places].T
