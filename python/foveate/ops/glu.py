"""swiglu and geglu: public functions, op schemas, fakes and gradients. Kernels: csrc/cpu/rows/glu.cpp, backend/triton/glu.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.reference import rows as reference_rows
from foveate.backend.registry import Query, register
from foveate.ops import autograd, library
from foveate.ops.autograd import batch_first, differentiable, in_plain_torch
from foveate.ops.checks import check_backend_name, check_floating, check_same_dtype, chosen_backend, compute_dtype
from foveate.ops.layout import matrix

_C = native._C

_native_shared = native.supports(cuda=False)


def _native_supports(query: Query) -> str | None:
    reason = _native_shared(query)
    if reason is None and not hasattr(_C, "glu_forward"):
        return "the compiled module is older than this op; build it again"
    return reason


for _op in ("swiglu", "geglu"):
    register(_op, "native", _native_supports)
    register(_op, "triton", triton_backend.serves)
    register(_op, "reference", lambda query: None)


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up = gate / (1 + exp(-gate)) * up, elementwise in one pass: the middle of a gated feed-forward layer.

    gate, up: one shape, [..., N], and one dtype: float32, bfloat16, float16 (computed in fp32) or float64. Returns a contiguous tensor
    of that shape and dtype, rounded once. Halves of one tensor (`x.chunk(2, -1)`) are read where they lie; rows that are not contiguous
    or not evenly spaced are copied. Differentiable in both, in both modes and any number of times;
    the backward pass keeps the inputs alone and computes the activation
    again. Raises TypeError for dtypes, ValueError for shapes, UnsupportedError for a named backend that cannot serve the call (the
    native one has no CUDA kernel; triton runs there). GLU variants: Shazeer 2020, arXiv 2002.05202.
    """
    return _glu("swiglu", gate, up, backend)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh", backend: str | None = None) -> Tensor:
    """gelu(gate) * up with GELU's tanh form, gate * (1 + tanh(sqrt(2 / pi) * (gate + 0.044715 * gate**3))) / 2, as Gemma has it.

    approximate: "tanh", or "none" for gate * Phi(gate) with the error function (Hendrycks and Gimpel 2016, arXiv 1606.08415), which the
    reference backend alone computes. Shapes, dtypes, gradients and errors as `swiglu`.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f'approximate={approximate!r} must be "tanh" or "none", as in torch.nn.functional.gelu')
    if approximate == "none":
        _check(gate, up)
        chosen_backend(
            "geglu with approximate='none'", gate, check_backend_name(backend)
        )  # raises for any other than the reference
        return reference_rows.glu(gate, up, "gelu")
    return _glu("geglu", gate, up, backend)


register("geglu with approximate='none'", "reference", lambda query: None)


def _check(gate: Tensor, up: Tensor) -> None:
    check_floating("gate", gate)
    check_same_dtype("up", up, "gate", gate)
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}; they must be equal")


def _glu(op: str, gate: Tensor, up: Tensor, backend: str | None) -> Tensor:
    _check(gate, up)
    preferred, how = check_backend_name(backend), autograd.way(gate, up)
    if how == "definition":
        return reference_rows.glu(gate, up, op)
    return autograd.run(how, _glu_impl, _glu_op, _Glu, gate, up, op == "geglu", preferred)


def _name(gelu: bool) -> str:
    return "geglu" if gelu else "swiglu"


def _glu_impl(gate: Tensor, up: Tensor, gelu: bool, backend: str = "native") -> Tensor:
    backend = chosen_backend(_name(gelu), gate, backend)
    if backend == "reference":
        return in_plain_torch(reference_rows.glu, gate, up, _name(gelu))
    out = _glu_fake(gate)
    if backend == "triton":
        from foveate.backend.triton.glu import glu

        glu(matrix(gate), matrix(up), matrix(out), gelu)
        return out
    _C.glu_forward(matrix(gate), matrix(up), matrix(out), gelu, torch.get_num_threads())
    return out


def _glu_fake(gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


def _glu_backward_impl(
    dout: Tensor, gate: Tensor, up: Tensor, gelu: bool, backend: str = "native"
) -> tuple[Tensor, Tensor]:
    backend = chosen_backend(_name(gelu), gate, backend)
    if backend == "reference":
        return in_plain_torch(_backward_definition, dout, gate, up, gelu, backend)
    dgate, dup = _glu_backward_fake(dout, gate)
    rows = (matrix(dout.contiguous()), matrix(gate), matrix(up), matrix(dgate), matrix(dup))
    if backend == "triton":
        from foveate.backend.triton.glu import glu_backward

        glu_backward(*rows, gelu)
        return dgate, dup
    _C.glu_backward(*rows, gelu, torch.get_num_threads())
    return dgate, dup


def _glu_backward_fake(dout: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_glu_op = library.define(
    "glu(Tensor gate, Tensor up, bool gelu, str backend='native') -> Tensor", impl=_glu_impl, fake=_glu_fake
)
_glu_backward = library.define(
    "glu_backward(Tensor dout, Tensor gate, Tensor up, bool gelu, str backend='native') -> (Tensor dgate, Tensor dup)",
    impl=_glu_backward_impl,
    fake=_glu_backward_fake,
)


def _glu_vmap(info: Any, in_dims: Any, gate: Tensor, up: Tensor, *options: Any) -> tuple[Tensor, int]:
    gate, up = (batch_first(t, dim, info.batch_size) for t, dim in zip((gate, up), in_dims))
    return _glu_op(gate, up, *options), 0


def _glu_backward_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    tensors = (batch_first(t, dim, info.batch_size) for t, dim in zip(args[:3], in_dims))
    return _glu_backward(*tensors, *args[3:]), (0, 0)


library.vmap("glu", _glu_vmap)
library.vmap("glu_backward", _glu_backward_vmap)


def _backward_definition(dout: Tensor, gate: Tensor, up: Tensor, gelu: bool, backend: str) -> tuple[Tensor, ...]:
    """glu_backward in plain torch."""
    dtype = compute_dtype(gate)
    d, g, u = (t.to(dtype) for t in (dout, gate, up))
    if gelu:
        slope = math.sqrt(2 / math.pi)
        t = torch.tanh(slope * (g + 0.044715 * g**3))
        activation = g * (1 + t) / 2
        derivative = (1 + t) / 2 + g * (1 - t * t) / 2 * slope * (1 + 3 * 0.044715 * g * g)
    else:
        share = torch.sigmoid(g)
        activation, derivative = g * share, share * (1 + g * (1 - share))
    return (d * u * derivative).to(gate.dtype), (d * activation).to(up.dtype)


class _Glu(torch.autograd.Function):
    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(gate: Tensor, up: Tensor, gelu: bool, backend: str) -> Tensor:
        return _glu_op(gate, up, gelu, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.gelu, ctx.backend = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None, None]:
        args = (dout, *ctx.saved_tensors, ctx.gelu, ctx.backend)
        dgate, dup = differentiable(_glu_backward, _backward_definition, *args)
        return dgate, dup, None, None
