"""foveate.attention and merge_attention: what a call means is checked here, then `autograd.run` runs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from foveate.backend.reference import attention as reference
from foveate.ops.attention import arguments as checks
from foveate.ops.attention import (
    nested,
    vmap,  # noqa: F401  # registers itself
)
from foveate.ops.attention.autograd import run, run_unusual
from foveate.ops.attention.relative_bias import RelativeBias
from foveate.ops.checks import check_flag

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foveate.ops.attention.arguments import DenseOptions


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[DenseOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[DenseOptions]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[DenseOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None,
    softcap: float | Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    sinks: Tensor | None = None,
    kv_lens: Tensor | None = None,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    score_mod_aux: Sequence[Tensor] = (),
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:  # out, or with return_lse (out, lse)
    """softmax(scale * q @ k.T + ...) @ v without storing the scores; O(Sq + Skv) memory in the native backend.

    q: [B, Sq, Hq, D]; k: [B, Skv, Hkv, D]; v: [B, Skv, Hkv, Dv]; Hkv divides Hq (query head h reads KV head h * Hkv // Hq); D and
    Dv from 1 on: the native kernels take up to 576 on the CPU and 256 on a GPU, triton 256; wider ones are the reference backend's, which
    stores the scores. One dtype and device for the three: float32, bfloat16, float16 (computed in fp32) or float64. Any strides; a
    last dimension that is not contiguous is copied. Returns out [B, Sq, Hq, Dv], or (out, lse [B, Hq, Sq]) with return_lse.

    With L = kv_lens[b] or Skv, and distance = j - (i + L - Sq) of key j and query i, the scores are, in this order,
    s = scale * q.k; softcap * tanh(s / softcap); - alibi_slopes * |distance| + bias + relative bias; score_mod; masks; softmax;
    dropout; @ v.

    causal: distance <= 0, so the last query sees the last key. window (left, right): -left <= distance <= right; None or -1 is
    unlimited. scale: D**-0.5 if None. softcap: None or 0 for none. bias: float, differentiable; mask: bool, True = keep; both
    broadcast to [B, Hq, Sq, Skv], from fewer dimensions too, and are not expanded in memory. alibi_slopes: fp32 [Hq] or [B, Hq].
    relative_bias: T5's buckets, see `RelativeBias`. sinks: [Hq], one more logit in each row's softmax, without a value.
    kv_lens: int32 or int64 [B], 0 to Skv; keys from there on are never read.

    score_mod: a @triton.jit function (score, b, h, i, j, aux) -> score, the last change of the scores before the masks; -inf masks. score
    is a tile in fp32, b, h, i, j its batch (in varlen the sequence), query head, query and key, which broadcast with it; aux the
    tensors score_mod_aux, on q's device. score_mod_bwd (score, grad, b, h, i, j, aux) -> grad: from the gradient of what score_mod gave
    that of what it was given; without it there is no backward pass. The triton backend only, and not inside torch.compile.

    dropout_p: in [0, 1), applied whenever it is not 0; Philox-4x32-10 seeded by two numbers from `generator` or torch's default
    generator, the same mask on every backend. deterministic: two backward passes give the same bits (on the CPU they always do);
    torch.use_deterministic_algorithms(True) asks for that too.
    lse: natural log of the sum of exp(s), without the sink, fp32 (fp64 for fp64 inputs), differentiable.
    A row that sees no key gives out 0, lse -inf and gradients 0. Differentiable in q, k, v, bias, the table and sinks, in both modes
    and any number of times; forward mode and second derivatives are computed in plain torch, with O(Sq * Skv) memory.
    Learned numbers: scale may be a tensor of one number or of one for each query head, [Hq], by which q is multiplied before the
    kernel, rounded once to its dtype; softcap a positive tensor of one number, with which the call is computed in plain torch. Both
    get gradients, and the values are not checked.
    Under autocast q, k and v are cast to its dtype. backend: "native", "triton", "reference", or None for the first that can.

    Nested tensors of layout torch.jagged, [B, lengths, H, D], all three, run through `attention_varlen` without a copy and without bias,
    mask and kv_lens; the result is nested as q, lse [Hq, total].

    Raises ValueError or TypeError for arguments that do not fit, UnsupportedError for a named backend that cannot serve the call.
    FlashAttention-2 (Dao 2023, arXiv 2307.08691) describes the algorithm.
    """
    if isinstance(q, Tensor) and q.is_nested:
        return nested.attention(
            q, k, v, causal=causal, window=window, scale=scale, softcap=softcap, bias=bias, mask=mask,
            alibi_slopes=alibi_slopes, relative_bias=relative_bias, sinks=sinks, kv_lens=kv_lens, score_mod=score_mod,
            score_mod_bwd=score_mod_bwd, score_mod_aux=score_mod_aux, dropout_p=dropout_p, generator=generator,
            deterministic=deterministic, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    B, Sq, Skv, Hq, _ = checks.check_dense(q, k, v)
    q, k, v = checks.same_kind(q, k, v)
    if bias is not None:
        bias = checks.check_scores_operand("bias", bias, q, (B, Hq, Sq, Skv))
    if mask is not None:
        mask = checks.check_scores_operand("mask", mask, q, (B, Hq, Sq, Skv))
    if kv_lens is not None:
        kv_lens = checks.check_lengths("kv_lens", kv_lens, q, B)
    if type(return_lse) is not bool:
        return_lse = check_flag("return_lse", return_lse)
    operands = checks.normalised(
        q, k, v, bias, mask, kv_lens, None, None, Sq, Skv, B, Hq, causal, window, scale, softcap, alibi_slopes, relative_bias, sinks,
        dropout_p, generator, deterministic, backend,
    )  # fmt: skip
    if (
        score_mod is not None
        or score_mod_bwd is not None
        or checks.has_aux(score_mod_aux)
        or isinstance(softcap, Tensor)
    ):
        out, lse = run_unusual(operands, score_mod, score_mod_bwd, score_mod_aux)
    else:
        out, lse = run(operands, return_lse)
    return (out, lse) if return_lse else out


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from the attention over each: exact and differentiable.

    out: [B, Sq, H, Dv] with lse [B, H, Sq], or packed [total, H, Dv] with [H, total]. Returns out and lse of the union:
    lse = log(exp(lse_a) + exp(lse_b)), out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b.
    A row that is empty in one set is that of the other; empty in both it stays 0 and -inf. Without sinks: a sink belongs to the
    whole row, not to each part.
    """
    if not all(isinstance(x, Tensor) for x in (out_a, lse_a, out_b, lse_b)):
        raise TypeError("merge_attention takes four torch.Tensors: out_a, lse_a, out_b, lse_b")
    shape, lse_shape = list(out_a.shape), list(lse_a.shape)
    rows = [*shape[:-3], *shape[-2:-4:-1]]
    if len(shape) not in (3, 4) or list(out_b.shape) != shape or lse_shape != rows or list(lse_b.shape) != rows:
        raise ValueError(
            "merge_attention takes out [B, Sq, H, Dv] with lse [B, H, Sq], or [total, H, Dv] with [H, total], twice; got "
            f"out {shape} with lse {lse_shape}, and out {list(out_b.shape)} with lse {list(lse_b.shape)}"
        )
    if out_a.dtype is not out_b.dtype or out_a.device != out_b.device:
        raise ValueError(
            f"out_a is {out_a.dtype} on {out_a.device} and out_b {out_b.dtype} on {out_b.device}; they must be equal"
        )
    return reference.merge_attention(out_a, lse_a, out_b, lse_b)
