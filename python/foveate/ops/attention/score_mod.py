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
from foveate.ops.attention.op import checked_rows, empty_grads, empty_lse, empty_out
from foveate.ops.attention.operands import NUM_TENSORS, Operands, per_operand, query_of, tensors_of, wanted_of
from foveate.ops.checks import check_same_device
from foveate.ops.layout import contiguous_rows
from foveate.ops.torch_internals import transforms_are_active


def run(c: Operands, forward: Any, backward: Any, aux: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out, lse with score_mod=forward, score_mod_bwd=backward and score_mod_aux=aux. Always by the triton backend."""
    if forward is None:
        raise ValueError("score_mod_bwd and score_mod_aux belong to score_mod, which is None; give it too")
    choose("attention", query_of(c, score_mod=True), c.backend or None)  # raises where it is not triton
    if torch.compiler.is_compiling():
        raise UnsupportedError("score_mod runs outside of torch.compile; wrap the call in torch.compiler.disable")
    how = autograd.way(*tensors_of(c))
    if how == "definition" or transforms_are_active() or isinstance(c.softcap, Tensor):
        raise UnsupportedError(
            "score_mod has its first gradient alone, by backward(): neither tangents nor torch.func's transforms go through it, and "
            "softcap beside it is a Python number"
        )
    for name, function in (("score_mod", forward), ("score_mod_bwd", backward)):
        _check_function(name, function)
    mod = (forward, backward, _checked_aux(aux, c.q))
    if how != "function":
        return _forward(c, mod)
    if backward is None:
        raise ValueError(
            "q, k, v or another input requires a gradient, but score_mod came without its derivative; give score_mod_bwd, or call "
            "under torch.no_grad()"
        )
    return _ScoreModAttention.apply(mod, *c)


def _check_function(name: str, function: Any) -> None:
    from triton.runtime.jit import KernelInterface

    if function is not None and not isinstance(function, KernelInterface):
        raise TypeError(f"{name} must be a function with @triton.jit above it, got {type(function).__name__}")


def _checked_aux(aux: Sequence[Tensor], q: Tensor) -> tuple[Tensor, ...]:
    for n, x in enumerate(aux):
        if not isinstance(x, Tensor):
            raise TypeError(f"score_mod_aux[{n}] must be a torch.Tensor, got {type(x).__name__}")
        check_same_device(f"score_mod_aux[{n}]", x, "q", q)
        if autograd.is_tracked(x):
            raise ValueError(f"score_mod_aux[{n}] has no gradient; pass it detached, or use bias or relative_bias")
    return tuple(aux)


def _forward(c: Operands, mod: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    from foveate.backend.triton.attention_launch import ScoreMod, forward

    out, lse = empty_out(c.q, c.v), empty_lse(c.q, c.cu_q)
    forward(checked_rows(c), out, lse, ScoreMod(*mod))
    return out, lse


class _ScoreModAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mod: tuple[Any, ...], *operands: Any) -> tuple[Tensor, Tensor]:
        *ctx.functions, aux = mod
        out, lse = _forward(Operands(*operands), mod)
        ctx.save_for_backward(*operands[:NUM_TENSORS], out, lse, *aux)
        ctx.options = operands[NUM_TENSORS:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        from foveate.backend.triton.attention_launch import ScoreMod, backward

        saved = ctx.saved_tensors
        tensors, (out, lse), aux = (
            saved[:NUM_TENSORS],
            saved[NUM_TENSORS : NUM_TENSORS + 2],
            saved[NUM_TENSORS + 2 :],
        )
        c = checked_rows(Operands(*tensors, *ctx.options))
        wanted = wanted_of(ctx.needs_input_grad[1:])
        dout = torch.zeros_like(out) if dout is None else contiguous_rows(dout)
        gradients = backward(
            dout,
            dlse,
            out,
            lse,
            c,
            wanted,
            empty_grads(c, wanted),
            ScoreMod(ctx.functions[0], ctx.functions[1], aux),
        )
        return None, *per_operand(gradients, wanted)
