"""rms_norm: public function, op schemas, fakes and gradient. Kernels: csrc/cpu/rows/rms_norm.cpp, csrc/cuda/rows/rms_norm.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.devices import num_sms
from foveate.backend.native import runs_cuda_kernels
from foveate.backend.reference import rows as reference_rows
from foveate.backend.registry import register
from foveate.ops import autograd, library
from foveate.ops.autograd import batch_first, differentiable, in_plain_torch
from foveate.ops.checks import (
    check_backend_name,
    check_dtype_or_compute,
    check_floating,
    check_number,
    check_same_dtype,
    chosen_backend,
    compute_dtype,
)
from foveate.ops.layout import matrix

_C = native._C

# dweight adds up over shares of the rows, then over the shares: less rounding than one long sum. On the CPU they are at most this
# many, whatever the number of threads, so that the bits are the same; on a GPU two blocks for each SM take one each.
_MAX_DWEIGHT_PARTS = 256
_ROWS_PER_PART, _ROWS_PER_PART_CUDA = 64, 16

register("rms_norm", "native", native.supports())
register("rms_norm", "triton", triton_backend.serves)
register("rms_norm", "reference", lambda query: None)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    *,
    normalized_shape: int | Sequence[int] | None = None,
    offset: float = 0.0,
    residual: None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    *,
    normalized_shape: int | Sequence[int] | None = None,
    offset: float = 0.0,
    residual: Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    *,
    normalized_shape: int | Sequence[int] | None = None,
    offset: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x**2) + eps) * (offset + weight) over the last dimension.

    x: [..., N], float32, bfloat16, float16 (computed in fp32) or float64; weight: [N] in x's dtype or the compute dtype, or None.
    eps: finite, not negative; None for torch.finfo(x.dtype).eps, as in torch.
    Returns [..., N], contiguous, in x's dtype, rounded once. Differentiable in x and weight, in both
    modes and any number of times; forward mode is computed in plain torch.
    x is copied if its rows are not contiguous or not evenly spaced. Raises TypeError for dtypes, ValueError for shapes and eps.

    normalized_shape: the last dimensions of x, over all of which the mean goes, as in torch.nn.functional.rms_norm; weight has this shape.
    offset: a number added to weight in the compute dtype, 1 for Gemma's; only with a weight.
    residual: of x's shape and dtype; the norm is that of h = x + residual, rounded to x's dtype, and the result (out, h), as a
    transformer block needs both: one kernel, forward and backward, which reads each tensor once. Differentiable in residual too.
    Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x has no dimensions; rms_norm needs at least the one to normalise")
    if residual is not None:
        check_same_dtype("residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)} and x {tuple(x.shape)}; they must be equal")
    if normalized_shape is not None:
        return _over_several(x, weight, eps, normalized_shape, offset, residual, backend)
    if weight is not None:
        check_dtype_or_compute("weight", weight, "x", x)
        if tuple(weight.shape) != (x.shape[-1],):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}; x of shape {tuple(x.shape)} needs ({x.shape[-1]},)"
            )
    if type(offset) is not float or offset != 0:
        offset = check_number("offset", offset)
        if weight is None:
            if offset not in (0, 1):
                raise ValueError(f"offset={offset} without a weight would only scale the result; pass a weight")
        else:
            weight = weight.to(compute_dtype(x)) + offset
    eps = torch.finfo(x.dtype).eps if eps is None else check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative")
    preferred, how = check_backend_name(backend), autograd.way(x, weight, residual)
    if how == "definition":
        h = x if residual is None else x + residual
        out, _ = reference_rows.rms_norm(h, weight, eps)
        return out if residual is None else (out, h)
    if residual is not None:
        ways = (_add_rms_norm_impl, _add_rms_norm, _AddRmsNorm)
        return autograd.run(how, *ways, x, residual, weight, eps, preferred)[:2]
    return autograd.run(how, _rms_norm_impl, _rms_norm, _RmsNorm, x, weight, eps, preferred)[0]


def _over_several(
    x: Tensor,
    weight: Tensor | None,
    eps: float | None,
    shape: int | Sequence[int],
    offset: float,
    residual: Tensor | None,
    backend: str | None,
) -> Any:
    """The last dimensions of x as one."""
    wanted = f"normalized_shape={shape!r} must be the last dimensions of x, of shape {tuple(x.shape)}"
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    if any(not isinstance(size, (int, torch.SymInt)) for size in sizes):
        raise TypeError(f"{wanted}, integers")
    if not sizes or len(sizes) > x.dim() or tuple(x.shape[-len(sizes) :]) != sizes:
        raise ValueError(wanted)
    if weight is not None:
        check_dtype_or_compute("weight", weight, "x", x)
        if tuple(weight.shape) != sizes:
            raise ValueError(f"weight has shape {tuple(weight.shape)}; normalized_shape needs {sizes}")
        weight = weight.flatten()
    options: dict[str, Any] = {"offset": offset, "backend": backend}
    if residual is None:
        return rms_norm(x.flatten(-len(sizes)), weight, eps, **options).unflatten(-1, sizes)
    out, h = rms_norm(x.flatten(-len(sizes)), weight, eps, residual=residual.flatten(-len(sizes)), **options)
    return out.unflatten(-1, sizes), h.unflatten(-1, sizes)


def _rms_norm_impl(x: Tensor, weight: Tensor | None, eps: float, backend: str = "native") -> tuple[Tensor, Tensor]:
    backend = chosen_backend("rms_norm", x, backend)
    if backend == "reference":
        return in_plain_torch(reference_rows.rms_norm, x, weight, eps)
    out, rstd = _rms_norm_fake(x, weight, eps)
    _forward(x, None, weight, eps, out, None, rstd, backend)
    return out, rstd


def _add_rms_norm_impl(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, backend: str = "native"
) -> tuple[Tensor, Tensor, Tensor]:
    backend = chosen_backend("rms_norm", x, backend)
    if backend == "reference":
        h = in_plain_torch(torch.add, x, residual)
        out, rstd = in_plain_torch(reference_rows.rms_norm, h, weight, eps)
        return out, h, rstd
    out, h, rstd = _add_rms_norm_fake(x, residual, weight, eps)
    _forward(x, residual, weight, eps, out, h, rstd, backend)
    return out, h, rstd


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    out: Tensor,
    h: Tensor | None,
    rstd: Tensor,
    backend: str,
) -> None:
    """Fills out, h (with a residual) and rstd."""
    weight = None if weight is None else weight.contiguous()
    rows = None if residual is None else matrix(residual)
    sums = None if h is None else matrix(h)
    if backend == "triton":
        from foveate.backend.triton.rms_norm import rms_norm

        return rms_norm(matrix(x), rows, weight, eps, matrix(out), sums, rstd.view(-1))
    return _C.rms_norm_forward(matrix(x), rows, weight, matrix(out), sums, rstd.view(-1), eps, torch.get_num_threads())


def _rms_norm_fake(x: Tensor, weight: Tensor | None, eps: float, *_: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=compute_dtype(x))


def _add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, *_: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=compute_dtype(x))


def _dweight_parts(rows: int, num_sms: int) -> int:
    """num_sms: SMs of the GPU, 0 for the CPU."""
    if num_sms == 0:
        return max(1, min(_MAX_DWEIGHT_PARTS, rows // _ROWS_PER_PART))
    return max(1, min(2 * num_sms, rows // _ROWS_PER_PART_CUDA))


def _rms_norm_backward_impl(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dsum: Tensor | None,
    need_dweight: bool,
    backend: str = "native",
) -> tuple[Tensor, Tensor]:
    backend = chosen_backend("rms_norm", x, backend)
    if backend == "reference":
        return in_plain_torch(_gradients_of, dout, x, weight, rstd[..., None], dsum, need_dweight)
    dsum = None if dsum is None else matrix(dsum.contiguous())
    dx, dweight = _rms_norm_backward_fake(dout, x, weight, rstd, dsum, need_dweight)
    if backend == "triton":
        from foveate.backend.triton.rms_norm import rms_norm_backward

        weight = None if weight is None else weight.contiguous()
        rstd = rstd.contiguous().view(-1)
        rms_norm_backward(
            matrix(dout.contiguous()), matrix(x), weight, rstd, dsum, matrix(dx), dweight if need_dweight else None
        )
        return dx, dweight
    threads = torch.get_num_threads()
    shares = _dweight_parts(x.shape[:-1].numel(), num_sms(x.device) if runs_cuda_kernels(x.device.type) else 0)
    parts = x.new_empty((shares, x.shape[-1]), dtype=compute_dtype(x)) if need_dweight else None
    weight = None if weight is None else weight.contiguous()
    dout, rstd = matrix(dout.contiguous()), rstd.contiguous().view(-1)
    _C.rms_norm_backward(dout, matrix(x), weight, rstd, dsum, matrix(dx), parts, threads)
    if parts is not None:
        torch.sum(parts, 0, out=dweight)
    return dx, dweight


def _rms_norm_backward_fake(
    dout: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, dsum: Tensor | None, need_dweight: bool, *_: str
) -> tuple[Tensor, Tensor]:
    dweight = x.new_empty(x.shape[-1] if need_dweight else 0, dtype=compute_dtype(x))
    return x.new_empty(x.shape), dweight


_rms_norm = library.define(
    "rms_norm(Tensor x, Tensor? weight, float eps, str backend='native') -> (Tensor out, Tensor rstd)",
    impl=_rms_norm_impl,
    fake=_rms_norm_fake,
)
_add_rms_norm = library.define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, str backend='native') "
    "-> (Tensor out, Tensor h, Tensor rstd)",
    impl=_add_rms_norm_impl,
    fake=_add_rms_norm_fake,
)
# dweight is empty unless needed, and in the compute dtype. dsum is added to dx: the gradient of x where x is a result of its own.
_rms_norm_backward = library.define(
    "rms_norm_backward(Tensor dout, Tensor x, Tensor? weight, Tensor rstd, Tensor? dsum, bool need_dweight, "
    "str backend='native') -> (Tensor dx, Tensor dweight)",
    impl=_rms_norm_backward_impl,
    fake=_rms_norm_backward_fake,
)


def _rms_norm_vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor | None, *options: Any) -> tuple[Any, Any]:
    x = batch_first(x, in_dims[0], info.batch_size)
    if weight is None or in_dims[1] is None:
        return _rms_norm(x, weight, *options), (0, 0)
    pairs = [_rms_norm(a, w, *options) for a, w in zip(x, weight.movedim(in_dims[1], 0))]
    return tuple(torch.stack(t) for t in zip(*pairs)), (0, 0)


def _add_rms_norm_vmap(
    info: Any, in_dims: Any, x: Tensor, residual: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Any, Any]:
    x, residual = (batch_first(t, d, info.batch_size) for t, d in zip((x, residual), in_dims))
    if weight is None or in_dims[2] is None:
        return _add_rms_norm(x, residual, weight, *options), (0, 0, 0)
    slices = zip(x, residual, weight.movedim(in_dims[2], 0))
    results = [_add_rms_norm(a, r, w, *options) for a, r, w in slices]
    return tuple(torch.stack(t) for t in zip(*results)), (0, 0, 0)


def _rms_norm_backward_vmap(
    info: Any, in_dims: Any, dout: Any, x: Any, weight: Any, rstd: Any, dsum: Any, *options: Any
) -> tuple[Any, Any]:
    # Each slice has its own dweight, so each is one call.
    n = info.batch_size
    slices = [None if t is None else batch_first(t, d, n) for t, d in zip((dout, x, weight, rstd, dsum), in_dims)]
    pairs = [_rms_norm_backward(*(None if t is None else t[i] for t in slices), *options) for i in range(n)]
    return tuple(torch.stack(t) for t in zip(*pairs)), (0, 0)


library.vmap("rms_norm", _rms_norm_vmap)
library.vmap("add_rms_norm", _add_rms_norm_vmap)
library.vmap("rms_norm_backward", _rms_norm_backward_vmap)


def _backward_definition(
    eps: float,
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dsum: Tensor | None,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """rms_norm_backward in plain torch, which computes rstd again, as it depends on x."""
    scale = torch.rsqrt(x.to(compute_dtype(x)).square().mean(-1, keepdim=True) + eps)
    return _gradients_of(dout, x, weight, scale, dsum, need_dweight)


def _gradients_of(
    dout: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor, dsum: Tensor | None, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """dx, dweight; scale [..., 1] is 1 / sqrt(mean(x**2) + eps)."""
    dtype = compute_dtype(x)
    g, normed = dout.to(dtype), x.to(dtype) * scale
    dweight = (g * normed).reshape(-1, x.shape[-1]).sum(0) if need_dweight else x.new_empty(0, dtype=dtype)
    g = g if weight is None else g * weight.to(dtype)
    dx = scale * (g - normed * (g * normed).mean(-1, keepdim=True))
    dx = dx if dsum is None else dx + dsum.to(dtype)
    return dx.to(x.dtype), dweight


class _RmsNorm(torch.autograd.Function):
    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, eps: float, backend: str) -> tuple[Tensor, Tensor]:
        return _rms_norm(x, weight, eps, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.eps, ctx.backend = inputs
        ctx.save_for_backward(x, weight, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        need_dweight = ctx.needs_input_grad[1]
        args = (dout, x, weight, rstd, None, need_dweight, ctx.backend)
        dx, dweight = differentiable(_rms_norm_backward, functools.partial(_backward_definition, ctx.eps), *args)
        return dx, dweight.to(weight.dtype) if need_dweight else None, None, None


class _AddRmsNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _add_rms_norm(x, residual, weight, eps, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, _, weight, ctx.eps, ctx.backend = inputs
        _, h, rstd = output
        ctx.save_for_backward(h, weight, rstd)
        ctx.mark_non_differentiable(rstd)

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dh: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, rstd = ctx.saved_tensors
        need_dweight = ctx.needs_input_grad[2]
        args = (dout, h, weight, rstd, dh, need_dweight, ctx.backend)
        dx, dweight = differentiable(_rms_norm_backward, functools.partial(_backward_definition, ctx.eps), *args)
        return dx, dx, dweight.to(weight.dtype) if need_dweight else None, None, None
