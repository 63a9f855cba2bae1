"""What the gradients of several ops share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def first_order(op: Any, *args: Any) -> Any:
    """op(*args) inside a backward pass. Where that pass is itself recorded (create_graph, torch.func), differentiating the result
    raises: the op has no gradient of its own, and torch would return a wrong one."""
    return _FirstOrder.apply(op, *args) if torch.is_grad_enabled() else op(*args)


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(f"{ctx.op} has no second derivative; use backend='reference' to differentiate twice")


def batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """For vmap rules: t with the mapped dimension in front, expanded (as a view) where t is not mapped."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def graph_is_freed() -> bool:
    """Inside a backward pass: whether it is the last one through its graph, so that what is saved there may be overwritten."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return kept is not None and not kept()
