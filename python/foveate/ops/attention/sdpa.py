"""foveate.sdpa: torch.nn.functional.scaled_dot_product_attention's exact signature and meaning on foveate's kernels."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from foveate.ops.attention.dense import attention
from foveate.ops.autograd import is_traced
from foveate.ops.checks import check_flag, check_strided


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | Tensor | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * query @ key.mT + mask) @ value.

    query: [..., Hq, Sq, D]; key: [..., Hkv, Skv, D]; value: [..., Hkv, Skv, Dv]; any number of leading dimensions, or none, which
    broadcast, as the heads do. Returns [..., Hq, Sq, Dv]. attn_mask broadcasts to [..., Hq, Sq, Skv]: bool with True = take part,
    or floating (query's dtype or float32), added and differentiable; or torch.nn.attention.bias.causal_upper_left and
    causal_lower_right, which are not stored. is_causal is top-left: query i sees keys 0 to i. dropout_p is applied as
    given, in eval mode too. scale defaults to D**-0.5. With enable_gqa the numbers of key and of value heads may divide
    Hq; if they differ from each other both are repeated. A row without keys gives 0.

    What torch takes and foveate does not (other dtypes, dropout_p=1, strided nested tensors, attn_mask together with
    is_causal) raises a ValueError.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.is_nested:
            return _nested_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale)
        if x.dim() < 2:
            raise ValueError(f"{name} has shape {list(x.shape)}; it needs at least two dimensions, [..., S, D]")
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        is_causal, enable_gqa = check_flag("is_causal", is_causal), check_flag("enable_gqa", enable_gqa)
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other; put the causal rule into attn_mask")

    lower_right = False
    if attn_mask is not None and type(attn_mask) is not Tensor and _is_causal_bias(attn_mask):
        is_causal, lower_right, attn_mask = _read_causal_bias(attn_mask, query, key)
    lead = None  # the leading dimensions of the result where they are not one batch
    if not (query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]):
        lead = _broadcast_lead(query, key, value)
    if attn_mask is not None:
        attn_mask = _mask_as_batch(attn_mask, query, query.shape[:1] if lead is None else lead)
    rank = query.dim(), key.dim(), value.dim()
    if lead is not None:
        for name, x in (("query", query), ("key", key), ("value", value)):
            check_strided(name, x)
        query, key, value = (_as_batch(x, lead) for x in (query, key, value))
    query, key, value = _match_heads(query, key, value, enable_gqa)

    Sq, Skv = query.shape[2], key.shape[2]
    window = None
    if lower_right:
        is_causal = True  # bottom-right, as in `attention`
    elif is_causal and is_traced() and Sq > Skv:
        # torch.jit.trace would keep the window below as two numbers, wrong for other lengths.
        i, j = (torch.arange(size, device=query.device) for size in (Sq, Skv))
        is_causal, attn_mask = False, j <= i[:, None]
    elif is_causal and Sq <= Skv:
        # No query sees a key after the Sq-th, and on a square bottom-right is top-left.
        key, value = key[:, :, :Sq], value[:, :, :Sq]
    elif is_causal:
        # j <= i, where the window counts from i + Skv - Sq.
        is_causal, window = False, (None, Sq - Skv)
    additive = attn_mask is not None and attn_mask.dtype is not torch.bool
    attend = attention if torch.compiler.is_compiling() else _attention
    out = attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=is_causal,
        window=window,
        scale=scale,
        bias=attn_mask if additive else None,
        mask=None if additive else attn_mask,
        dropout_p=dropout_p,
    )
    out = out.transpose(1, 2)
    if lead is None:
        return out
    return out.reshape(*lead, *out.shape[1:]) if max(rank) > 2 else out[0, 0]


# The arguments of `attention` are named otherwise in its errors.
_NAMES = {"q": "query", "k": "key", "v": "value", "bias": "attn_mask", "mask": "attn_mask"}
_NAME = re.compile(rf"\b({'|'.join(_NAMES)})\b")


def _attention(*tensors: Tensor, **options: Any) -> Tensor:
    """`attention`, whose errors speak of this function's arguments."""
    try:
        return attention(*tensors, **options)
    except (TypeError, ValueError) as error:
        if len(error.args) != 1:
            raise
        renamed = type(error)(_NAME.sub(lambda name: _NAMES[name[0]], str(error)))
        raise renamed.with_traceback(error.__traceback__) from None


def _is_causal_bias(mask: Tensor) -> bool:
    from torch.nn.attention.bias import CausalBias

    return isinstance(mask, CausalBias)


def _read_causal_bias(mask: Any, query: Tensor, key: Tensor) -> tuple[bool, bool, None]:
    """(is_causal, lower_right, no mask) of a torch.nn.attention.bias.CausalBias."""
    from torch.nn.attention.bias import CausalVariant

    sizes, lengths = (mask.seq_len_q, mask.seq_len_kv), (query.shape[-2], key.shape[-2])
    if sizes != lengths:
        raise ValueError(f"attn_mask is a CausalBias for {sizes} queries and keys; query and key have {lengths}")
    lower_right = mask.variant == CausalVariant.LOWER_RIGHT
    return not lower_right, lower_right, None


def _nested_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | Tensor | None,
) -> Tensor:
    """Jagged [B, H, lengths, D], as torch.nn.functional.scaled_dot_product_attention takes them."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not x.is_nested or x.layout is not torch.jagged or x.dim() != 4:
            raise ValueError(
                f"{name} must be a jagged nested tensor [B, H, lengths, D] as the others are; convert a strided one with "
                f"torch.nested.nested_tensor(list(x.unbind()), layout=torch.jagged), or call foveate.attention_varlen"
            )
    if attn_mask is not None:
        raise ValueError("attn_mask does not go with nested tensors, whose lengths are their own; pad them")
    if is_causal and query.shape[2] != key.shape[2]:
        raise ValueError("is_causal=True of nested tensors needs the same offsets in query and key")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, causal=is_causal, scale=scale, dropout_p=dropout_p).transpose(1, 2)


def _broadcast_lead(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3]))
    except RuntimeError:
        raise ValueError(
            "the leading dimensions of query, key and value must broadcast to each other; got shapes "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        ) from None


def _as_batch(x: Tensor, lead: tuple[int, ...]) -> Tensor:
    """x [..., H, S, D], with H = 1 if x has no heads, as [batch, H, S, D] with the product of `lead` as the batch."""
    if x.dim() == 2:
        x = x[None]
    x = x.expand(*lead, *x.shape[-3:])
    return x[None] if not lead else x.flatten(0, len(lead) - 1)


def _mask_as_batch(mask: Tensor, query: Tensor, lead: tuple[int, ...]) -> Tensor:
    """attn_mask [..., H, Sq, Skv] with at most four dimensions, the batch first."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"attn_mask must be a torch.Tensor, got {type(mask).__name__}")
    dtype = mask.dtype
    if dtype not in (torch.bool, torch.float32, query.dtype) and not _autocast_is_on(query):
        raise ValueError(f"attn_mask has dtype {dtype}; it must be torch.bool, torch.float32 or query's {query.dtype}")
    own = tuple(mask.shape[:-3])
    if mask.dim() < 2 or len(own) > len(lead) or any(n not in (1, full) for n, full in zip(own[::-1], lead[::-1])):
        raise ValueError(
            f"attn_mask of shape {list(mask.shape)} does not broadcast to [..., Hq, Sq, Skv] with leading dimensions {list(lead)}"
        )
    if all(n == 1 for n in own):
        return mask.reshape(mask.shape[-3:]) if own else mask
    return _as_batch(mask, lead)


def _autocast_is_on(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _match_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Heads that `attention` takes: key and value have the same number, a divisor of query's. [B, H, S, D] all."""
    Hq, Hk, Hv = query.shape[1], key.shape[1], value.shape[1]
    if Hq == Hk == Hv:
        return query, key, value
    if enable_gqa:
        if Hk == 0 or Hv == 0 or Hq % Hk or Hq % Hv:
            raise ValueError(f"query has {Hq} heads, key {Hk} and value {Hv}; the last two must divide the first")
        if Hk != Hv:
            key, value = key.repeat_interleave(Hq // Hk, dim=1), value.repeat_interleave(Hq // Hv, dim=1)
        return query, key, value
    H = max(Hq, Hk, Hv)
    if any(heads not in (1, H) for heads in (Hq, Hk, Hv)):
        raise ValueError(
            f"query has {Hq} heads, key {Hk} and value {Hv}; without enable_gqa=True they must be equal, or 1 to broadcast"
        )
    if Hk != Hv:
        key, value = (x.expand(-1, H, -1, -1) for x in (key, value))
    return query.expand(-1, H, -1, -1), key, value
