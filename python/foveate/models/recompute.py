"""Activations that are computed again in the backward pass instead of being kept (Korthikanti et al. 2022, arXiv 2205.05198).

The outputs of norms and of activation functions are cheap, large, and kept only as the inputs of linear layers, which need them for
the gradient of their weight. Their own inputs are kept anyway. The gradients are the same bit for bit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foveate.ops.autograd import no_second_derivative
from foveate.ops.torch_internals import transforms_are_active

_ONCE = "what is computed again in the backward pass has no second derivative; call the model within foveate.models.recompute.kept()"


class _State(threading.local):
    off = False


_state = _State()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it everything is kept: for a layer that is computed again as a whole."""
    before, _state.off = _state.off, True
    try:
        yield
    finally:
        _state.off = before


def feed(linear: Callable[[Tensor], Tensor], function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """linear(function(*inputs)), for which only `inputs` are kept. function: differentiable, without weights and random numbers."""
    if not _applies(inputs[0]):
        return linear(function(*inputs))
    x = _Recomputed.apply(function, *inputs)
    with _saved_as(x, function, *inputs):
        return linear(x)


def recomputed(x: Tensor, norm: nn.Module, of: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it, operations that would keep x = norm(of) for their backward pass keep `of`, which norm's own keeps anyway."""
    return _saved_as(x, norm, of) if _applies(x) else contextlib.nullcontext()


def _applies(x: Tensor) -> bool:
    """Not where torch takes no hooks for saved tensors: in torch.compile and torch.func."""
    if not (torch.is_grad_enabled() and x.requires_grad) or _state.off:
        return False
    return not (torch.compiler.is_compiling() or transforms_are_active())


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:  # type: ignore[override]
        return None, *no_second_derivative(_gradients, _ONCE, ctx.function, dout, *ctx.saved_tensors)


def _gradients(function: Callable[..., Tensor], dout: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    with torch.enable_grad():
        return torch.autograd.grad(function(*inputs), inputs, dout)


def _saved_as(x: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> contextlib.AbstractContextManager[Any]:
    place, size, dtype = x.data_ptr(), x.numel(), x.dtype

    def pack(t: Tensor) -> Any:
        same = t.data_ptr() == place and t.numel() == size and t.dtype is dtype and t.is_contiguous()
        return t.shape if same else t

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return no_second_derivative(function, _ONCE, *inputs).view(saved)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
