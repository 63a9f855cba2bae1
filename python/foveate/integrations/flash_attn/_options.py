"""flash_attn's options in foveate's words, and the probabilities that its tests ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.backend.reference import attention as reference
from foveate.ops.attention import arguments
from foveate.ops.checks import check_integer

Window = Sequence[int] | Tensor
Result = Tensor | tuple[Tensor, Tensor, Tensor]


def window_of(window_size: Window) -> tuple[int, int]:
    """(left, right) of a pair in any form: tuple, list, numpy array, tensor (which waits for its device). None is unlimited."""
    pair = window_size.tolist() if isinstance(window_size, Tensor) else window_size
    if not isinstance(pair, Iterable) or len(pair := list(pair)) != 2:
        raise ValueError(
            f"window_size={window_size!r} must be a pair (left, right) of key counts, where -1 is unlimited"
        )
    left, right = (-1 if side is None else int(side) for side in pair)
    return max(left, -1), max(right, -1)


def length_of(cache_seqlens: Any) -> int:
    """One length for all rows, as a Python or a numpy integer."""
    return check_integer("cache_seqlens", cache_seqlens, "one integer, or an int32 tensor [B]")


def options_of(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> dict[str, Any]:
    """The shared tail of flash_attn's training functions."""
    return {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "causal": causal,
        "window": window_of(window_size),
        "softcap": softcap or None,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
        "return_lse": return_attn_probs,
    }


def dense(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Result:
    """`foveate.attention`, with S_dmask as the third result where the lse is asked for."""
    if not options["return_lse"]:
        return foveate.attention(q, k, v, **options)
    if not options["dropout_p"]:
        return (*foveate.attention(q, k, v, **options), q.new_empty(0))
    generator, again = _twins(q.device)
    result = foveate.attention(q, k, v, generator=generator, **options)
    philox = arguments.draw_philox(q.device, again)
    return (*result, _signed(q, k, options, philox))


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, options: dict[str, Any]
) -> Result:
    """`foveate.attention_varlen`, likewise: S_dmask is padded, [B, Hq, max_q, max_k]."""
    lengths = (cu_q, cu_k, int(max_q), int(max_k))
    if not options["return_lse"]:
        return foveate.attention_varlen(q, k, v, *lengths, **options)
    if not options["dropout_p"]:
        return (*foveate.attention_varlen(q, k, v, *lengths, **options), q.new_empty(0))
    generator, again = _twins(q.device)
    result = foveate.attention_varlen(q, k, v, *lengths, generator=generator, **options)
    philox = arguments.draw_philox(q.device, again)
    starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
    padded = q.new_zeros(len(starts_q) - 1, q.shape[1], max_q, max_k)
    for b, row in enumerate(padded):
        of_q, of_k = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        slopes = options["alibi_slopes"]
        own = {**options, "alibi_slopes": slopes if slopes is None or slopes.dim() == 1 else slopes[b]}
        part = _signed(q[of_q][None], k[of_k][None], own, philox, first_batch=b)[0]
        row[:, : part.shape[1], : part.shape[2]] = part
    return (*result, padded)


def _twins(device: torch.device) -> tuple[torch.Generator, torch.Generator]:
    """Two generators that draw the same: one for the kernel, one to know what it drew."""
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    return torch.Generator(device).manual_seed(seed), torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def _signed(q: Tensor, k: Tensor, options: dict[str, Any], philox: Tensor, first_batch: int = 0) -> Tensor:
    """exp(score - the row's largest) [B, Hq, Sq, Sk] in q's dtype, negative where dropout strikes, 0 where the key is not seen."""
    B, Sq, Hq, D = q.shape
    Sk = k.shape[1]
    scale = D**-0.5 if options["scale"] is None else options["scale"]
    keys = k.float().repeat_interleave(Hq // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", q.float() * scale, keys)
    if options["softcap"]:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    distance = torch.arange(Sk, device=q.device) - torch.arange(Sq, device=q.device)[:, None] - (Sk - Sq)
    if options["alibi_slopes"] is not None:
        scores = scores - options["alibi_slopes"].float()[..., None, None] * distance.abs()
    left, right = options["window"]
    right = 0 if options["causal"] else right
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    scores = scores.masked_fill(hidden, float("-inf"))
    largest = scores.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
    weights = torch.exp(scores - largest)
    keep = reference.philox_keep(philox, options["dropout_p"], B, Hq, Sq, Sk, first_batch)
    return torch.where(keep, weights, -weights).to(q.dtype)
