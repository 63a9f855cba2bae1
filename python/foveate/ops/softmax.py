"""softmax and log_softmax: public functions, op schemas, fakes and gradients. Kernels: csrc/cpu/rows/softmax.cpp."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.native import runs_cuda_kernels
from foveate.backend.reference import rows as reference_rows
from foveate.backend.registry import register
from foveate.ops import autograd, library
from foveate.ops.autograd import batch_first, differentiable, in_plain_torch
from foveate.ops.checks import (
    check_backend_name,
    check_dtype_or_compute,
    check_flag,
    check_floating,
    check_integer,
    check_learned,
    check_number,
    check_same_device,
    chosen_backend,
    compute_dtype,
)
from foveate.ops.layout import contiguous_rows

_C = native._C

for _op in ("softmax", "log_softmax"):
    register(_op, "native", native.supports())
    register(_op, "triton", triton_backend.serves)
    register(_op, "reference", lambda query: None)


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    scale: float | Tensor | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * x + bias) over `dim`, with masked elements counting as -inf, in one fused pass.

    x: any shape; float32, bfloat16, float16 (computed in fp32) or float64. The result has its shape and dtype and is contiguous.
    scale: finite, 1 if None; a tensor of one number is differentiable too. mask: bool, True = keep. bias: x's dtype or the compute
    dtype. Both broadcast to x's shape and are not expanded in memory. causal: in the last two dimensions, element [i, j] is kept if
    j <= i + cols - rows (bottom-right), only with dim=-1. A line that is masked as a whole, or is all -inf, gives 0 with gradient 0,
    not NaN. Differentiable in x and bias, in both modes and any number of times; the gradient of a bias needs one temporary of x's
    shape in the compute dtype. Forward mode and a tensor as scale are computed in plain torch.

    On the CPU, another dimension than the last of a contiguous x is read where it lies, if it comes without bias and mask. Otherwise the
    kernel runs over the last dimension: x is copied if `dim` is another one or is not contiguous.
    Raises TypeError for dtypes, ValueError for other arguments that do not fit, UnsupportedError for a named backend that cannot
    serve the call. The one-pass maximum and sum are Milakov and Gimelshein's (2018, arXiv 1805.02867).
    """
    check_floating("x", x)
    dim = _check_dim(x, dim)
    learned = isinstance(scale, Tensor)
    if isinstance(scale, Tensor):
        check_learned("scale", scale, "x", x, backend)
    else:
        scale = 1.0 if scale is None else check_number("scale", scale)
    causal = check_flag("causal", causal)
    if causal and (x.dim() < 2 or dim != x.dim() - 1):
        raise ValueError(
            f"causal masks the last two dimensions along dim=-1; x has {x.dim()} dimensions and dim={dim}: "
            "pass a matrix with dim=-1, or a mask"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, True = keep; got {kind}: pass a float one as bias")
        _check_broadcast("mask", mask, x)
    if bias is not None:
        check_dtype_or_compute("bias", bias, "x", x)
        _check_broadcast("bias", bias, x)
    preferred, how = check_backend_name(backend), autograd.way(x, bias, mask)
    if learned or how == "definition":
        return reference_rows.softmax(x, dim, scale, mask, bias, causal)
    if x.dim() == 0:
        return softmax(x[None], 0, scale=scale, mask=mask, bias=bias, backend=backend)[0]
    if mask is not None:
        mask = _dim_last(mask, x, dim)
    if bias is not None:
        bias = _dim_last(bias, x, dim)
    if dim == x.dim() - 1:
        return autograd.run(how, _softmax_impl, _softmax, _Softmax, x, bias, mask, scale, causal, preferred)
    x = x.movedim(dim, -1)
    out = autograd.run(how, _softmax_impl, _softmax, _Softmax, x, bias, mask, scale, causal, preferred)
    return out.movedim(-1, dim).contiguous()


def log_softmax(x: Tensor, dim: int = -1, *, backend: str | None = None) -> Tensor:
    """x - logsumexp(x) over `dim`. Shapes, dtypes, copies and errors as `softmax`; a line of nothing but -inf stays -inf."""
    check_floating("x", x)
    dim = _check_dim(x, dim)
    preferred, how = check_backend_name(backend), autograd.way(x)
    if how == "definition":
        return reference_rows.log_softmax(x, dim)
    if x.dim() == 0:
        return log_softmax(x[None], 0, backend=backend)[0]
    if dim == x.dim() - 1:
        return autograd.run(how, _log_softmax_impl, _log_softmax, _LogSoftmax, x, preferred)
    out = autograd.run(how, _log_softmax_impl, _log_softmax, _LogSoftmax, x.movedim(dim, -1), preferred)
    return out.movedim(-1, dim).contiguous()


def _dim_last(t: Tensor, x: Tensor, dim: int) -> Tensor:
    """t, which broadcasts to x, with x's number of dimensions and `dim` moved to the end."""
    return t[(None,) * (x.dim() - t.dim())].movedim(dim, -1)


def _check_dim(x: Tensor, dim: int) -> int:
    dim = check_integer("dim", dim, "one dimension, an integer")
    rank = max(x.dim(), 1)
    if not -rank <= dim < rank:
        raise ValueError(
            f"dim={dim} is out of range for x with {x.dim()} dimensions; choose one of {-rank}..{rank - 1}"
        )
    return dim % rank


def _check_broadcast(name: str, t: Tensor, x: Tensor) -> None:
    check_same_device(name, t, "x", x)
    shape, target = tuple(t.shape), tuple(x.shape)
    if len(shape) > len(target) or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(target))):
        raise ValueError(f"{name} of shape {shape} does not broadcast to x of shape {target}")


# Fewer lanes side by side than this are not worth a vector: rows are then copied together.
_MIN_INNER = 8


def _columns(x: Tensor, backend: str) -> int | None:
    """For x whose last dimension has been moved there from place i of a contiguous tensor: i, if the kernel can read it in its place."""
    if not x.is_cpu or x.dim() < 2 or x.stride(-1) < _MIN_INNER or runs_cuda_kernels("cpu"):
        return None
    if chosen_backend("softmax", x, backend) != "native":
        return None
    return next((i for i in range(x.dim() - 1) if x.movedim(-1, i).is_contiguous()), None)


def _as_columns(x: Tensor, place: int) -> Tensor:
    """[outer, cols, inner] of x as `_columns` takes it; a copy where another tensor is laid out otherwise."""
    return x.movedim(-1, place).reshape(math.prod(x.shape[:place]), x.shape[-1], math.prod(x.shape[place:-1]))


def _softmax_impl(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool, backend: str = "native"
) -> Tensor:
    backend = chosen_backend("softmax", x, backend)
    if backend == "reference":
        return in_plain_torch(reference_rows.softmax, x, -1, scale, mask, bias, causal)
    if backend == "triton":
        from foveate.backend.triton.softmax import softmax

        return softmax(x, bias, mask, scale, causal)
    out = _softmax_fake(x, bias, mask, scale, causal, backend)
    place = _columns(out, backend)
    if place is not None:
        x, y = _as_columns(x, place), _as_columns(out, place)
        _C.softmax_columns_forward(x, y, scale, False, torch.get_num_threads())
        return out
    x = contiguous_rows(x)
    bias = None if bias is None else contiguous_rows(bias).expand(x.shape)
    mask = None if mask is None else contiguous_rows(mask).expand(x.shape)
    _C.softmax_forward(x, bias, mask, out, scale, causal, False, torch.get_num_threads())
    return out


def _log_softmax_impl(x: Tensor, backend: str = "native") -> Tensor:
    backend = chosen_backend("log_softmax", x, backend)
    if backend == "reference":
        return in_plain_torch(reference_rows.log_softmax, x)
    if backend == "triton":
        from foveate.backend.triton.softmax import log_softmax

        return log_softmax(x)
    out = _log_softmax_fake(x, backend)
    place = _columns(out, backend)
    if place is not None:
        _C.softmax_columns_forward(_as_columns(x, place), _as_columns(out, place), 1.0, True, torch.get_num_threads())
        return out
    x = contiguous_rows(x)
    _C.softmax_forward(x, None, None, out, 1.0, False, True, torch.get_num_threads())
    return out


def _softmax_backward_impl(
    dout: Tensor, out: Tensor, scale: float, log: bool, wide: bool, backend: str = "native"
) -> Tensor:
    backend = chosen_backend("log_softmax" if log else "softmax", out, backend)
    if backend == "reference":
        return in_plain_torch(_backward_definition, dout, out, scale, log, wide, backend)
    if backend == "triton":
        from foveate.backend.triton.softmax import softmax_backward

        return softmax_backward(dout, out, scale, log, wide)
    dx = _softmax_backward_fake(dout, out, scale, log, wide, backend)
    place = _columns(dx, backend)
    if place is not None:
        dout, out = (_as_columns(t, place).contiguous() for t in (dout, out))
        _C.softmax_columns_backward(dout, out, _as_columns(dx, place), scale, log, torch.get_num_threads())
        return dx
    dout, out = dout.contiguous(), out.contiguous()
    _C.softmax_backward(dout, out, dx, scale, log, torch.get_num_threads())
    return dx


def _softmax_fake(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool, backend: str = "native"
) -> Tensor:
    return x.new_empty(x.shape) if bias is not None or mask is not None or causal else _log_softmax_fake(x, backend)


def _log_softmax_fake(x: Tensor, backend: str = "native") -> Tensor:
    """Laid out as x where the kernel reads x in its place."""
    return x.new_empty(x.shape) if _columns(x, backend) is None else torch.empty_like(x)


def _softmax_backward_fake(
    dout: Tensor, out: Tensor, scale: float, log: bool, wide: bool, backend: str = "native"
) -> Tensor:
    dtype = compute_dtype(out) if wide else out.dtype
    place = _columns(out, backend)
    if place is None:
        return out.new_empty(out.shape, dtype=dtype)
    return torch.empty_like(out, dtype=dtype)


_softmax = library.define(
    "softmax(Tensor x, Tensor? bias, Tensor? mask, Scalar scale, bool causal, str backend='native') -> Tensor",
    impl=_softmax_impl,
    fake=_softmax_fake,
)
_log_softmax = library.define(
    "log_softmax(Tensor x, str backend='native') -> Tensor", impl=_log_softmax_impl, fake=_log_softmax_fake
)
# `wide` gives the gradient in the compute dtype, for sums that follow.
_softmax_backward = library.define(
    "softmax_backward(Tensor dout, Tensor out, Scalar scale, bool log, bool wide, str backend='native') -> Tensor",
    impl=_softmax_backward_impl,
    fake=_softmax_backward_fake,
)


def _softmax_vmap(info: Any, in_dims: Any, x: Any, bias: Any, mask: Any, *options: Any) -> tuple[Tensor, int]:
    def front(t: Tensor | None, dim: int | None) -> Tensor | None:
        return t if t is None else t[None] if dim is None else t.movedim(dim, 0)

    x = batch_first(x, in_dims[0], info.batch_size)
    return _softmax(x, front(bias, in_dims[1]), front(mask, in_dims[2]), *options), 0


def _log_softmax_vmap(info: Any, in_dims: Any, x: Tensor, *backend: str) -> tuple[Tensor, int]:
    return _log_softmax(x.movedim(in_dims[0], 0), *backend), 0


def _softmax_backward_vmap(info: Any, in_dims: Any, dout: Any, out: Any, *options: Any) -> tuple[Tensor, int]:
    dout, out = (batch_first(t, dim, info.batch_size) for t, dim in zip((dout, out), in_dims))
    return _softmax_backward(dout, out, *options), 0


library.vmap("softmax", _softmax_vmap)
library.vmap("log_softmax", _log_softmax_vmap)
library.vmap("softmax_backward", _softmax_backward_vmap)


def _backward_definition(dout: Tensor, out: Tensor, scale: float, log: bool, wide: bool, backend: str) -> Tensor:
    """softmax_backward in plain torch."""
    dtype = compute_dtype(out)
    g, y = dout.to(dtype), out.to(dtype)
    dx = g - y.exp() * g.sum(-1, keepdim=True) if log else scale * y * (g - (y * g).sum(-1, keepdim=True))
    return dx if wide else dx.to(out.dtype)


class _Softmax(torch.autograd.Function):
    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool, backend: str
    ) -> Tensor:
        return _softmax(x, bias, mask, scale, causal, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, bias, _, ctx.scale, _, ctx.backend = inputs
        ctx.bias_shape, ctx.bias_dtype = (None, None) if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            dx = differentiable(
                _softmax_backward, _backward_definition, dout, out, ctx.scale, False, False, ctx.backend
            )
            return dx, None, None, None, None, None
        ds = differentiable(_softmax_backward, _backward_definition, dout, out, 1.0, False, True, ctx.backend)
        dx = (ds * ctx.scale).to(out.dtype) if ctx.needs_input_grad[0] else None
        return dx, ds.sum_to_size(ctx.bias_shape).to(ctx.bias_dtype), None, None, None, None


class _LogSoftmax(torch.autograd.Function):
    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(x: Tensor, backend: str) -> Tensor:
        return _log_softmax(x, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        ctx.backend = inputs[1]
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return differentiable(_softmax_backward, _backward_definition, dout, out, 1.0, True, False, ctx.backend), None
