"""apply_rotary: public function, op schema, fake and gradient. Kernel: csrc/cpu/rows/rotary.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.reference import rows as reference_rows
from foveate.backend.registry import register
from foveate.ops import autograd, library
from foveate.ops.autograd import batch_first, differentiable, in_plain_torch
from foveate.ops.checks import (
    check_backend_name,
    check_dtype_or_compute,
    check_flag,
    check_floating,
    check_same_dtype,
    chosen_backend,
)
from foveate.ops.layout import contiguous_rows

_C = native._C

register("apply_rotary", "native", native.supports())
register("apply_rotary", "triton", triton_backend.serves)
register("apply_rotary", "reference", lambda query: None)


def apply_rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding: rotates pairs (a, b) of the first `rot` elements of each head to (a cos - b sin, b cos + a sin).

    q: [B, S, Hq, D]; k: [B, S, Hkv, D]; one dtype of float32, bfloat16, float16 (computed in fp32) or float64. cos, sin:
    [S, rot / 2] or [B, S, rot / 2] with rot <= D, in q's dtype or the compute dtype. A pair is (x[c], x[c + rot / 2]), or
    (x[2c], x[2c + 1]) with interleaved; elements from rot on stay. Returns the rotated q and k as new contiguous tensors.
    Differentiable in q and k, in both modes and any number of times; forward mode is computed in plain torch. Tables that require a
    gradient raise ValueError. Any strides; a last dimension that is not contiguous is copied. Raises TypeError for dtypes, ValueError
    for shapes.
    RoFormer, Su et al. 2021, arXiv 2104.09864.
    """
    check_floating("q", q)
    check_same_dtype("k", k, "q", q)
    interleaved = check_flag("interleaved", interleaved)
    if q.dim() != 4 or k.dim() != 4 or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"q must be [B, S, Hq, D] and k [B, S, Hkv, D] with the same B, S and D; got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    B, S, _, D = q.shape
    for name, table in (("cos", cos), ("sin", sin)):
        check_dtype_or_compute(name, table, "q", q)
        if table.dim() not in (2, 3) or tuple(table.shape[:-1]) not in ((S,), (B, S)) or 2 * table.shape[-1] > D:
            raise ValueError(
                f"{name} has shape {tuple(table.shape)}; q of shape {tuple(q.shape)} needs ({S}, rot / 2) or ({B}, {S}, rot / 2) "
                f"with rot up to {D}"
            )
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"cos and sin differ: {tuple(cos.shape)} {cos.dtype} and {tuple(sin.shape)} {sin.dtype}")
    preferred, how = check_backend_name(backend), autograd.way(q, k, cos, sin)
    if how == "function":
        for name, table in (("cos", cos), ("sin", sin)):
            if autograd.is_tracked(table):
                raise ValueError(
                    f"{name} requires a gradient, which apply_rotary does not compute; pass {name}.detach()"
                )
    if how == "definition":
        return reference_rows.apply_rotary(q, k, cos, sin, interleaved)
    return autograd.run(how, _rotary_impl, _apply_rotary, _Rotary, q, k, cos, sin, interleaved, False, preferred)


def _rotary_impl(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, backend: str = "native"
) -> tuple[Tensor, Tensor]:
    backend = chosen_backend("apply_rotary", q, backend)
    if backend == "reference":
        return in_plain_torch(_definition, q, k, cos, sin, interleaved, inverse, backend)
    out = _rotary_fake(q, k, cos, sin, interleaved, inverse)
    cos, sin = contiguous_rows(cos), contiguous_rows(sin)
    if backend == "triton":
        from foveate.backend.triton.rotary import rotary

        for x, rotated in zip((q, k), out):
            rotary(contiguous_rows(x), cos, sin, rotated, interleaved, inverse)
        return out
    for x, rotated in zip((q, k), out):
        _C.rotary(contiguous_rows(x), cos, sin, rotated, interleaved, inverse, torch.get_num_threads())
    return out


def _rotary_fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


# inverse rotates back, which is the gradient.
_apply_rotary = library.define(
    "apply_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse, "
    "str backend='native') -> (Tensor q_out, Tensor k_out)",
    impl=_rotary_impl,
    fake=_rotary_fake,
)


def _rotary_vmap(info: Any, in_dims: Any, q: Any, k: Any, cos: Any, sin: Any, *flags: Any) -> tuple[Any, Any]:
    n = info.batch_size
    q, k = batch_first(q, in_dims[0], n), batch_first(k, in_dims[1], n)
    folded = [t.flatten(0, 1) for t in (q, k)]  # [n * B, S, H, D]
    tables = []
    for t, dim in ((cos, in_dims[2]), (sin, in_dims[3])):
        if dim is not None or t.dim() == 3:
            t = batch_first(t, dim, n)
            t = t if t.dim() == 4 else t[:, None].expand(n, q.shape[1], *t.shape[1:])
            t = t.flatten(0, 1)
        tables.append(t)
    if tables[0].dim() != tables[1].dim():
        tables = [t.expand(n * q.shape[1], *t.shape[-2:]) for t in tables]
    out = _apply_rotary(*folded, *tables, *flags)
    return tuple(t.unflatten(0, (n, -1)) for t in out), (0, 0)


library.vmap("apply_rotary", _rotary_vmap)


def _definition(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The op in plain torch."""
    return reference_rows.apply_rotary(q, k, cos, -sin if inverse else sin, interleaved)


class _Rotary(torch.autograd.Function):
    generate_vmap_rule = True  # the op has its own rule

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return _apply_rotary(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, cos, sin, ctx.interleaved, ctx.inverse, ctx.backend = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        args = (dq, dk, cos, sin, ctx.interleaved, not ctx.inverse, ctx.backend)
        dq, dk = differentiable(_apply_rotary, _definition, *args)
        return dq, dk, None, None, None, None, None
