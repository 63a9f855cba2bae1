"""torch.func.vmap of the attention ops: the mapped dimension joins the batch where it can, else one call per slice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from foveate.ops import library
from foveate.ops.attention.op import attention_backward, attention_forward
from foveate.ops.attention.operands import AXES, Gradients, Operands

_BATCHED = tuple(name for name, axes in AXES.items() if axes[0] == "B")
_BROADCAST = tuple(name for name, axes in AXES.items() if axes[0] == "B?")
_SHARED = tuple(name for name in AXES if name not in _BATCHED + _BROADCAST)


def _fold(x: Any, dim: int | None, V: int, B: int) -> Tensor | None:
    """x with V mapped slices as [V * B, ...]; x without them is repeated, as a view where strides allow."""
    if x is None:
        return None
    x = x[None].expand(V, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(V, B, *x.shape[2:]).flatten(0, 1)


def _folded(c: Operands, dims: Any, V: int, wanted_bias: bool = False) -> Operands | None:
    """The call with V * B batch rows, or None where that would mean something else."""
    if c.cu_q is not None or c.dropout_p > 0:  # packed rows; the dropout mask depends on the batch row
        return None
    if any(getattr(dims, name) is not None for name in _SHARED):
        return None
    B = c.q.shape[0] if dims.q is None else c.q.movedim(dims.q, 0).shape[1]
    changed: dict[str, Any] = {name: _fold(getattr(c, name), getattr(dims, name), V, B) for name in _BATCHED}
    for name in _BROADCAST:
        x, dim = getattr(c, name), getattr(dims, name)
        shared = x is not None and dim is None and x.shape[0] == 1 and not (wanted_bias and name == "bias")
        changed[name] = x if shared else _fold(x, dim, V, B)
    return c._replace(**changed)


def _loop(op: Callable[..., Any], V: int, args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, Any]:
    slices = []
    for i in range(V):
        slices.append(op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, dims))))
    return tuple(torch.stack(results) for results in zip(*slices)), (0,) * len(slices[0])


def _forward(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    V = info.batch_size
    c = _folded(Operands(*args), Operands(*in_dims), V)
    if c is None:
        return _loop(attention_forward, V, args, in_dims)
    return tuple(x.unflatten(0, (V, -1)) for x in attention_forward(*c)), (0, 0)


def _backward(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    V, (dout, dlse, out, lse, *operands, wanted) = info.batch_size, args
    c, dims = Operands(*operands), cast(Any, Operands(*in_dims[4:-1]))
    # The op sums the gradients of what all batch rows share; a mapped call has one for each slice.
    want = Gradients(*wanted)
    summed = any(name in _SHARED and asked for name, asked in want._asdict().items())
    folded = None if summed else _folded(c, dims, V, wanted_bias=want.bias)
    if folded is None:
        return _loop(attention_backward, V, args, (*in_dims[:-1], None))
    B = folded.q.shape[0] // V
    rows = (_fold(x, dim, V, B) for x, dim in zip((dout, dlse, out, lse), in_dims))
    gradients = zip(attention_backward(*rows, *folded, wanted), wanted)
    grads = Gradients(*(x.unflatten(0, (V, -1)) if asked else x.expand(V, 0) for x, asked in gradients))
    if want.bias and c.bias is not None:
        batch = c.bias.shape[0] if dims.bias is None else c.bias.movedim(dims.bias, 0).shape[1]
        if batch == 1:
            grads = grads._replace(bias=grads.bias.sum(1, keepdim=True))
    return tuple(grads), (0,) * len(grads)


library.vmap("attention_forward", _forward)
library.vmap("attention_backward", _backward)
