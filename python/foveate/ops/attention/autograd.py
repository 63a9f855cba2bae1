"""The way from a call to the attention ops: straight to the kernel where nothing stands between, else through autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.ops import autograd, dtensor, flops
from foveate.ops.attention import score_mod
from foveate.ops.attention.definition import definition
from foveate.ops.attention.op import attention_backward, attention_forward, forward
from foveate.ops.attention.operands import DIFFERENTIABLE, NUM_TENSORS, Operands, make, per_operand, wanted_of
from foveate.ops.torch_internals import VMAP, innermost_transform


class Attention(torch.autograd.Function):
    """out, lse of `Operands`, differentiable in q, k, v, bias, rel_table and sinks through both outputs."""

    generate_vmap_rule = True  # the ops below have their own vmap rules

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return attention_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:NUM_TENSORS], *output)
        ctx.options = inputs[NUM_TENSORS:]
        # Zeros for an output that the loss does not use are left out, but for vmap: torch 2.6 does not map what is not there.
        ctx.set_materialize_grads(_vmapped())

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        wanted = wanted_of(ctx.needs_input_grad)
        if dout is None:
            dout = torch.zeros_like(out)
        args = (dout, dlse, out, lse, *tensors, *ctx.options, wanted)
        grads = autograd.differentiable(attention_backward, _backward_definition, *args)
        return tuple(per_operand(grads, wanted))


def _backward_definition(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """attention_backward in plain torch, O(Sq * Skv) memory: for second derivatives."""
    *operands, wanted = args
    grads = (dout,) if dlse is None else (dout, dlse)

    def results(*operands: Any) -> tuple[Tensor, ...]:
        return definition(make(operands))[: len(grads)]

    places = [i for i, want in zip(DIFFERENTIABLE, wanted, strict=True) if want]
    pulled = iter(autograd.pull_back(results, operands, places, grads))
    return tuple(next(pulled) if want else dout.new_empty(0) for want in wanted)


# Function.apply inspects the signature of forward on every call (20 us) for functorch's sake; below it is the part that autograd needs.
_apply = super(torch.autograd.Function, Attention).apply


def run_unusual(values: tuple[Any, ...], mod: Any, mod_bwd: Any, aux: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out, lse of `Operands` as a plain tuple, with a score_mod or a learned softcap."""
    c = Operands(*values)
    if mod is not None or mod_bwd is not None or aux:
        return score_mod.run(c, mod, mod_bwd, aux)
    return definition(c)


def run(values: tuple[Any, ...], need_lse: bool) -> tuple[Any, ...]:
    """out, lse of `Operands` by the shortest way that is right: dispatch and autograd cost as much as a decode step."""
    way = autograd.way(*values[:NUM_TENSORS])
    if way == "kernel":
        return forward(make(values), need_lse)
    c = Operands(*values)
    flops.register()
    if type(c.q) not in autograd.PLAIN_TYPES:
        dtensor.notice(c.q)
    if way == "definition":
        return definition(c)
    # A graph without gradients has the op alone: torch.jit cannot save the autograd.Function, nor does a compiler gain from it.
    if autograd.is_traced():  # where sizes are tensors, and so is the default D**-0.5
        c = c._replace(scale=float(c.scale))
    if way == "op":
        return attention_forward(*c)
    args = autograd.distinct(c) if torch.compiler.is_compiling() else c
    if torch.compiler.is_compiling() or innermost_transform is None or innermost_transform() is not None:
        return Attention.apply(*args)
    return _apply(*args)


def _vmapped() -> bool:
    """True right below torch.vmap."""
    if torch.compiler.is_compiling() or innermost_transform is None:
        return False
    level = innermost_transform()
    return level is not None and level.key() == VMAP
