"""flash_attn's private backward functions: what packages that spread attention over processes call with an lse over all keys."""

from __future__ import annotations

import torch
from torch import Tensor

import foveate
from foveate.ops.attention import arguments
from foveate.ops.attention.op import attention_backward
from foveate.ops.attention.operands import Gradients, Operands, chosen

_OF_QKV = list(Gradients(q=True, k=True, v=True, bias=False, rel_table=False, sinks=False))


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """The gradients of `flash_attn_func` from its out and lse [B, Hq, Sq], written into dq, dk and dv. Returns sum(dout * out) of each row.

    out and softmax_lse may be over more keys than k and v have, as in ring attention: the gradients are then this part's. Dropout is
    refused, whose mask `_flash_attn_forward` does not hand on.
    """
    q, k, v = arguments.same_kind(q, k, v)
    lengths = (None, None, q.shape[1], k.shape[1], q.shape[0])
    options = (causal, (window_size_left, window_size_right), softmax_scale, softcap, alibi_slopes)
    gradients = _gradients(dout, out, softmax_lse, (q, k, v), lengths, options, dropout_p, deterministic)
    _written(gradients, (dq, dk, dv))
    return (dout.float() * out.float()).sum(-1).transpose(1, 2).contiguous()


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """Likewise for packed sequences, with softmax_lse [Hq, total_q]. Every row of the gradients is written, whatever zero_tensors says."""
    q, k, v = arguments.same_kind(q, k, v)
    cu_q, cu_k = (
        arguments.check_lengths(name, x, q, None) for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k))
    )  # fmt: skip
    lengths = (cu_q, cu_k, int(max_seqlen_q), int(max_seqlen_k), cu_q.shape[0] - 1)
    options = (causal, (window_size_left, window_size_right), softmax_scale, softcap, alibi_slopes)
    gradients = _gradients(dout, out, softmax_lse, (q, k, v), lengths, options, dropout_p, deterministic)
    _written(gradients, (dq, dk, dv))
    return (dout.float() * out.float()).sum(-1).T.contiguous()


def _gradients(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[Tensor | None, Tensor | None, int, int, int],
    options: tuple[bool, tuple[int, int], float | None, float, Tensor | None],
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    if dropout_p:
        raise foveate.UnsupportedError(
            f"dropout_p={dropout_p}: the mask of the forward pass is not in rng_state here; use flash_attn_func, whose gradient knows it"
        )
    cu_q, cu_k, max_q, max_k, B = lengths
    causal, window, scale, softcap, alibi_slopes = options
    c = Operands(
        *arguments.normalised(
            *qkv, None, None, None, cu_q, cu_k, max_q, max_k, B, qkv[0].shape[-2], bool(causal), window, scale, softcap or None,
            alibi_slopes, None, None, 0.0, None, bool(deterministic), None,
        )
    )  # fmt: skip
    if chosen("attention_backward", c) == "reference":
        raise foveate.UnsupportedError(
            "only the reference backend serves this call, which computes the lse again from the keys it is given; use flash_attn_func"
        )
    with torch.no_grad():
        return tuple(attention_backward(dout.contiguous(), None, out.contiguous(), lse.contiguous(), *c, _OF_QKV)[:3])


def _written(gradients: tuple[Tensor, ...], into: tuple[Tensor | None, ...]) -> None:
    for gradient, target in zip(gradients, into):
        if target is not None:
            target.copy_(gradient)
