"""The functions of the flash_attn package (version 2), with its names, parameters and meaning, on every device and dtype of foveate.

    from foveate.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    from foveate.integrations.flash_attn.bert_padding import unpad_input, pad_input

Shapes are [B, S, H, D], packed [total, H, D]. Hkv divides Hq. causal is aligned to the bottom right: the last query sees the last
key. window_size=(left, right) shows query i the keys i + Sk - Sq - left to i + Sk - Sq + right, -1 is unlimited. softcap=0.0 is
off. alibi_slopes, fp32 [Hq] or [B, Hq], adds -slope * |i + Sk - Sq - j|. A row that sees no key gives zeros.

return_attn_probs=True gives (out, lse, S_dmask) with lse fp32 [B, Hq, Sq], or [Hq, total] packed. S_dmask is empty, as it is in
flash_attn without dropout; with dropout it would be the [B, Hq, Sq, Sk] probabilities, which foveate never stores: that raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.integrations.flash_attn import bert_padding as bert_padding

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = tuple[int, int]
Result = Tensor | tuple[Tensor, Tensor, Tensor]


def _options(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> dict[str, Any]:
    """The shared tail of flash_attn's training functions in foveate's words."""
    if return_attn_probs and dropout_p > 0:
        raise foveate.UnsupportedError(
            f"return_attn_probs=True with dropout_p={dropout_p} asks for the probabilities, which foveate never stores; "
            "with dropout_p=0.0 it returns (out, lse, an empty tensor)"
        )
    return {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "causal": causal,
        "window": window_size,
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_lse": return_attn_probs,
    }


def _result(q: Tensor, returned: Any, return_attn_probs: bool) -> Result:
    return (*returned, q.new_empty(0)) if return_attn_probs else returned


def _unpack(packed: Tensor, name: str, parts: int) -> tuple[Tensor, ...]:
    """[..., parts, H, D] -> views [..., H, D]."""
    if packed.ndim < 3 or packed.shape[-3] != parts:
        raise ValueError(f"{name} has shape {list(packed.shape)}; it takes [..., {parts}, heads, head_dim]")
    return packed.unbind(-3)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """q [B, Sq, Hq, D]; k, v [B, Sk, Hkv, D] -> out [B, Sq, Hq, D]. Options: see the module."""
    options = _options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _result(q, foveate.attention(q, k, v, **options), return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """kv [B, Sk, 2, Hkv, D]; the rest as `flash_attn_func`."""
    k, v = _unpack(kv, "kv", 2)
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *tail)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [B, S, 3, H, D]; the rest as `flash_attn_func`."""
    q, k, v = _unpack(qkv, "qkv", 3)
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_func(q, k, v, *tail)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """q [total_q, Hq, D]; k, v [total_k, Hkv, D]; cu_seqlens int32 [B + 1] -> out [total_q, Hq, D]."""
    if block_table is not None:
        raise foveate.UnsupportedError(
            "flash_attn_varlen_func with block_table: packed queries against a paged cache are not served; "
            "pad the queries and use flash_attn_with_kvcache, or gather the pages into k and v"
        )
    options = _options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _result(q, foveate.attention_varlen(q, k, v, *lengths, **options), return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """kv [total_k, 2, Hkv, D]; the rest as `flash_attn_varlen_func`, without block_table."""
    k, v = _unpack(kv, "kv", 2)
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *tail)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """qkv [total, 3, H, D]; one cu_seqlens for queries and keys; the rest as `flash_attn_varlen_func`."""
    q, k, v = _unpack(qkv, "qkv", 3)
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *tail)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k, v in place at cache_seqlens (after rotary), then attends q to the cache. No backward.

    q [B, Sq, Hq, D]; k, v [B, Snew, Hkv, D]; caches [B_cache, S_cache, Hkv, D], or [pages, page_size, Hkv, D] with block_table
    int32 [B, max_pages], of any page size. cache_seqlens: the keys before the append, one int, [B], or None for a full cache that
    is only read. cache_batch_idx [B]: the row of the cache that each row of q uses. cache_seqlens is not changed.
    cache_leftpad, and rotary for several queries without causal or window, raise UnsupportedError.
    Returns out [B, Sq, Hq, D], or (out, lse [B, Hq, Sq]) with return_softmax_lse.
    """
    B = q.shape[0]
    if cache_leftpad is not None:
        raise foveate.UnsupportedError(
            "cache_leftpad: a cache that starts in the middle of its row is not served; "
            "store each sequence from position 0 (cache_seqlens gives its length) or use block_table"
        )
    if rotary_cos is not None:
        if k is None:
            raise ValueError(
                "rotary_cos and rotary_sin came without k and v to append; without them rotate q before the call"
            )
        if q.shape[1] > 1 and not causal and tuple(window_size) == (-1, -1):
            raise foveate.UnsupportedError(
                f"rotary with {q.shape[1]} queries, causal=False and no window: flash_attn would turn every query by the one "
                "position cache_seqlens, foveate turns query i by cache_seqlens + i; rotate q and k before the call"
            )
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx and block_table both choose the memory of a row; give one of them")
        # A dense cache is a paged one whose pages are its rows: nothing is copied, and appends land in the right row.
        block_table = cache_batch_idx.to(torch.int32).reshape(B, 1)
    if cache_seqlens is None:
        if k is not None or block_table is not None:
            raise ValueError(
                "cache_seqlens is None: appending k and v, or reading pages, needs the length of each sequence"
            )
        cache_seqlens = k_cache.shape[1]
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((B,), cache_seqlens, dtype=torch.int32, device=q.device)
    return foveate.attention_with_kv_cache(
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        kv_lens=cache_seqlens,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        causal=causal,
        window=window_size,
        scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
    )
