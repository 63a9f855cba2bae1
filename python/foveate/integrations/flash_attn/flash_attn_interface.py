"""flash_attn_interface: see `foveate.integrations.flash_attn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.integrations.flash_attn import _options, _packed
from foveate.integrations.flash_attn._backward import _flash_attn_backward as _flash_attn_backward
from foveate.integrations.flash_attn._backward import _flash_attn_varlen_backward as _flash_attn_varlen_backward
from foveate.integrations.flash_attn._options import Result, Window
from foveate.integrations.flash_attn.layers.rotary import apply_rotary_emb

USE_TRITON_ROCM = False  # names that programs import beside the functions
_ONE_BLOCK = 2**30


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys between two updates of the row's largest score, as S_dmask shows them: it belongs to the whole row here."""
    return _ONE_BLOCK


def _unpack(packed: Tensor, name: str, parts: int) -> tuple[Tensor, ...]:
    """[..., parts, H, D] -> views [..., H, D]."""
    if packed.ndim < 3 or packed.shape[-3] != parts:
        raise ValueError(f"{name} has shape {list(packed.shape)}; it takes [..., {parts}, heads, head_dim]")
    return packed.unbind(-3)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, S_dmask, an empty rng_state) without a gradient: the private function that ring attention packages call."""
    window = (window_size_left, window_size_right)
    with torch.no_grad():
        tail = (dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, False, True)
        return (*_options.dense(q, k, v, _options.options_of(*tail)), q.new_empty(0))


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Likewise for packed sequences; seqused_k [B]: the keys in use of each, of pages with block_table."""
    if num_splits > 1 or leftpad_k is not None:
        raise RuntimeError(
            f"num_splits > 1 is not supported for packed sequences, nor is leftpad_k (num_splits={num_splits}); "
            "use flash_attn_with_kvcache"
        )
    tail = (dropout_p, softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes, False, True)
    options = _options.options_of(*tail)
    with torch.no_grad():
        if block_table is not None:
            lens = _packed.lengths_of(cu_seqlens_k) if seqused_k is None else seqused_k
            return (*varlen_paged(q, k, v, cu_seqlens_q, lens, max_seqlen_q, block_table, options), q.new_empty(0))
        if seqused_k is not None:
            rows, cu_seqlens_k = _packed.used_rows(cu_seqlens_k, seqused_k, k.shape[0])
            k, v = k[rows], v[rows]
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return (*_options.varlen(q, k, v, *lengths, options), q.new_empty(0))


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
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return _options.dense(q, k, v, _options.options_of(*tail))


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
    """q [total_q, Hq, D]; k, v [total_k, Hkv, D]; cu_seqlens int32 [B + 1] -> out [total_q, Hq, D].

    With block_table int32 [B, max_pages], k and v are pages [pages, page_size, Hkv, D] of any size and cu_seqlens_k says how many keys
    each sequence has in them. Where a gradient is needed the keys in use are copied out of the pages first.
    """
    tail = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    options = _options.options_of(*tail)
    if block_table is None:
        return _options.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options)
    return varlen_paged(q, k, v, cu_seqlens_q, _packed.lengths_of(cu_seqlens_k), max_seqlen_q, block_table, options)


def varlen_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    max_seqlen_q: int,
    block_table: Tensor,
    options: dict[str, Any],
) -> Result:
    """Packed queries [total_q, Hq, D] against a paged cache that holds kv_lens[b] keys of sequence b."""
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_pages, v_pages))
    if needs_gradient or options["dropout_p"]:
        rows, cu_k = _packed.paged_rows(block_table, k_pages.shape[1], kv_lens)
        k, v = k_pages.flatten(0, 1)[rows], v_pages.flatten(0, 1)[rows]
        longest = int(kv_lens.max()) if kv_lens.numel() else 0
        return _options.varlen(q, k, v, cu_seqlens_q, cu_k, max_seqlen_q, longest, options)
    B, longest = kv_lens.shape[0], int(max_seqlen_q)
    places = _packed.padded_places(cu_seqlens_q, q.shape[0], longest, right=True)
    shared = {name: options[name] for name in ("causal", "window", "scale", "softcap", "alibi_slopes")}
    out, lse = foveate.attention_with_kv_cache(
        _packed.pad(q, places, B, longest), k_pages, v_pages, kv_lens=kv_lens.int(), block_table=block_table,
        return_lse=True, **shared,
    )  # fmt: skip
    out = out.flatten(0, 1)[places]
    return (out, lse.transpose(1, 2).flatten(0, 1)[places].T, q.new_empty(0)) if options["return_lse"] else out


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
    is only read. cache_batch_idx [B]: the row of the cache that each row of q uses. cache_leftpad [B]: where the keys of a row
    begin; cache_seqlens counts from the start of the row all the same. cache_seqlens is not changed.
    rotary: query i is rotated by position cache_seqlens + i with causal or a window, and by cache_seqlens without.
    Returns out [B, Sq, Hq, D], or (out, lse [B, Hq, Sq]) with return_softmax_lse.
    """
    B, page_size, window = q.shape[0], k_cache.shape[1], _options.window_of(window_size)
    if rotary_cos is not None and k is None:
        raise ValueError(
            "rotary_cos and rotary_sin came without k and v to append; without them rotate q before the call"
        )
    if cache_batch_idx is not None and block_table is not None:
        raise ValueError("cache_batch_idx and block_table both choose the memory of a row; give one of them")
    if cache_seqlens is None:
        if k is not None or block_table is not None or cache_leftpad is not None:
            raise ValueError(
                "cache_seqlens is None: appending k and v, reading pages, or cache_leftpad needs the length of each sequence"
            )
        cache_seqlens = page_size
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = torch.full((B,), _options.length_of(cache_seqlens), dtype=torch.int32, device=q.device)
    _check_capacity(cache_seqlens, 0 if k is None else k.shape[1], block_table, page_size)
    one_position = not causal and window == (-1, -1) and q.shape[1] > 1
    if rotary_cos is not None and (one_position or cache_leftpad is not None):
        if k is None or rotary_sin is None:
            raise ValueError(
                "rotary_cos needs rotary_sin, and k and v to append; without them rotate q before the call"
            )
        q, k = _rotated(q, k, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, one_position)
        rotary_cos = rotary_sin = None
    if cache_leftpad is not None:
        # Pages of one key: sequence b begins at its own key, nothing is copied, and appends land where they should.
        block_table = _packed.key_table(cache_batch_idx, block_table, page_size, B, cache_leftpad)
        k_cache, v_cache = _packed.single_keys(k_cache, "k_cache"), _packed.single_keys(v_cache, "v_cache")
        cache_seqlens = cache_seqlens - cache_leftpad
    elif cache_batch_idx is not None:
        # A dense cache is a paged one whose pages are its rows: nothing is copied, and appends land in the right row.
        block_table = cache_batch_idx.to(torch.int32).reshape(B, 1)
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
        window=window,
        scale=softmax_scale,
        softcap=softcap or None,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
    )


class CapacityError(ValueError, RuntimeError):
    """A block_table too short for its sequences: flash_attn raises RuntimeError, foveate ValueError."""


def _check_capacity(cache_seqlens: Tensor, new: int, block_table: Tensor | None, page_size: int) -> None:
    if block_table is None or not cache_seqlens.is_cpu or not cache_seqlens.numel():
        return  # on a GPU the kernel stops there, without a wait
    longest, room = int(cache_seqlens.max()) + new, block_table.shape[1] * page_size
    if longest > room:
        raise CapacityError(
            f"a sequence has {longest} keys, {new} of them new, and block_table names {block_table.shape[1]} pages of {page_size}, "
            f"which hold {room}; give it more pages"
        )


def _rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, start: Tensor, interleaved: bool, one_position: bool
) -> tuple[Tensor, Tensor]:
    """q and k as the kernel would rotate them, for the cases in which its positions are others."""
    k = apply_rotary_emb(k, cos, sin, interleaved=interleaved, seqlen_offsets=start)
    if not one_position:
        return apply_rotary_emb(q, cos, sin, interleaved=interleaved, seqlen_offsets=start), k
    row = apply_rotary_emb(q.flatten(1, 2)[:, None], cos, sin, interleaved=interleaved, seqlen_offsets=start)
    return row[:, 0].unflatten(1, q.shape[1:3]), k
