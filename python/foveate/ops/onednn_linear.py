"""fp32 matrix products on x86 through oneDNN, where torch's own go through MKL, which leaves AMD's AVX-512 unused (half the speed)."""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SMALL = 2**21  # multiply-adds below which the call's overhead outweighs the gain


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias for a [m, k], b [n, k], both possibly transposed views. The result is fp32-exact either way, not bit-equal."""
    if _suits(a, b.shape[0]):
        return _onednn()(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


def _suits(a: Tensor, n: int) -> bool:
    return a.is_cpu and a.dtype is torch.float32 and a.numel() * n >= _SMALL and _onednn() is not None


@functools.cache
def _onednn() -> Any:
    """The op that torch's compiler calls for linear layers, or None where this torch has none."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        need_dx, need_dweight, _ = ctx.needs_input_grad
        ctx.shape = x.shape
        ctx.save_for_backward(x if need_dweight else None, weight if need_dx else None)  # frozen under LoRA
        return product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable  # torch has no derivative of oneDNN's product
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dout.reshape(-1, dout.shape[-1])
        dx = product(rows, weight.t()).view(ctx.shape) if ctx.needs_input_grad[0] else None
        dweight = product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if ctx.needs_input_grad[1] else None
        dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear for training, forward and backward by `product`; differentiable once."""
    if torch.is_autocast_enabled(x.device.type) or not _suits(x, weight.shape[0]):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)
