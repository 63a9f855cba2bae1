"""Attention with score_mod, a function of the caller that runs inside the Triton kernels.

It is no op of torch.ops: a schema has no place for a function. So there is an autograd.Function and no fake kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.backend.registry import UnsupportedError, choose
from foveate.ops import autograd
from foveate.ops.attention import op as attention_op
from foveate.ops.attention.op import Operands

_NUM_TENSORS = attention_op._NUM_TENSORS
_DIFFERENTIABLE = attention_op._DIFFERENTIABLE


def run(operands: tuple[Any, ...], forward: Any, backward: Any, aux: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out, lse of `Operands` with score_mod=forward, score_mod_bwd=backward and score_mod_aux=aux. Always by the triton backend."""
    c = Operands(*operands)
    if forward is None:
        raise ValueError("score_mod_bwd and score_mod_aux belong to score_mod, which is None; give it too")
    used = tuple(name == "score_mod" for name in attention_op._OPTION_NAMES)
    call = attention_op.query(c.q.device.type, c.q.dtype, c.q.shape[-1], c.v.shape[-1], used)
    choose("attention", call, c.backend or None)  # raises where it is not triton
    if torch.compiler.is_compiling():
        raise UnsupportedError("score_mod runs outside of torch.compile; wrap the call in torch.compiler.disable")
    how = autograd.way(*operands[:_NUM_TENSORS])
    if how == "definition" or torch._C._are_functorch_transforms_active() or isinstance(c.softcap, Tensor):
        raise UnsupportedError(
            "score_mod has its first gradient alone, by backward(): neither tangents nor torch.func's transforms go through it, and "
            "softcap beside it is a Python number"
        )
    for name, function in (("score_mod", forward), ("score_mod_bwd", backward)):
        _check_function(name, function)
    mod = (forward, backward, _checked_aux(aux, c.q))
    if how == "op":
        return _forward(c, mod)
    if backward is None:
        raise ValueError(
            "q, k, v or another input requires a gradient, but score_mod came without its derivative; give score_mod_bwd, or call "
            "under torch.no_grad()"
        )
    return _ScoreModAttention.apply(mod, *operands)


def _check_function(name: str, function: Any) -> None:
    from triton.runtime.jit import KernelInterface

    if function is not None and not isinstance(function, KernelInterface):
        raise TypeError(f"{name} must be a function with @triton.jit above it, got {type(function).__name__}")


def _checked_aux(aux: Sequence[Tensor], q: Tensor) -> tuple[Tensor, ...]:
    for n, x in enumerate(aux):
        if not isinstance(x, Tensor):
            raise TypeError(f"score_mod_aux[{n}] must be a torch.Tensor, got {type(x).__name__}")
        if x.device != q.device:
            raise ValueError(f"score_mod_aux[{n}] is on {x.device} and q on {q.device}; move it with .to(q.device)")
        if autograd.is_tracked(x):
            raise ValueError(f"score_mod_aux[{n}] has no gradient; pass it detached, or use bias or relative_bias")
    return tuple(aux)


def _forward(c: Operands, mod: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    from foveate.backend.triton.attention_launch import ScoreMod, forward

    out, lse = attention_op._empty_out(c.q, c.v), attention_op._empty_lse(c.q, c.cu_q)
    forward(attention_op._ready(c), out, lse, ScoreMod(*mod))
    return out, lse


class _ScoreModAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mod: tuple[Any, ...], *operands: Any) -> tuple[Tensor, Tensor]:
        *ctx.functions, aux = mod
        out, lse = _forward(Operands(*operands), mod)
        ctx.save_for_backward(*operands[:_NUM_TENSORS], out, lse, *aux)
        ctx.options = operands[_NUM_TENSORS:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        from foveate.backend.triton.attention_launch import ScoreMod, backward

        saved = ctx.saved_tensors
        tensors, (out, lse), aux = (
            saved[:_NUM_TENSORS],
            saved[_NUM_TENSORS : _NUM_TENSORS + 2],
            saved[_NUM_TENSORS + 2 :],
        )
        c = attention_op._ready(Operands(*tensors, *ctx.options))
        wanted = [ctx.needs_input_grad[1 + i] for i in _DIFFERENTIABLE]
        dout = torch.zeros_like(out) if dout is None else attention_op._rows(dout)
        found = backward(
            dout,
            dlse,
            out,
            lse,
            c,
            wanted,
            attention_op._empty_grads(c, wanted),
            ScoreMod(ctx.functions[0], ctx.functions[1], aux),
        )
        grads: list[Tensor | None] = [None] * (1 + _NUM_TENSORS + len(ctx.options))
        for i, want, grad in zip(_DIFFERENTIABLE, wanted, found):
            grads[1 + i] = grad if want else None
        return tuple(grads)
