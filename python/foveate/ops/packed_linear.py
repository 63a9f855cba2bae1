"""packed_linear: y = x @ W.T + bias with a packed W, the op of `foveate.nn.PackedLinear`. Kernel: csrc/cpu/linear/linear.cpp."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.registry import Query, choose, register
from foveate.ops import autograd, flops, library
from foveate.ops.autograd import differentiable
from foveate.ops.checks import check_backend_name, check_same_device, chosen_backend
from foveate.quantization.gguf_blocks import BLOCK, block_size
from foveate.quantization.panels import FLOATS, packed_bytes, unpack_rows, unpack_weight
from foveate.quantization.scaled_blocks import ON_FLOATS

_C = native._C


TRITON_FORMATS = ("f32", "bf16", "q8_0", "q4_0", "q4_1")


def _triton_serves(query: Query) -> str | None:
    missing = [format for format in query.features if format not in TRITON_FORMATS]
    if missing:
        return f"the triton kernels have no {missing[0]}; load the model with quantization='q8_0', 'q4_0' or 'none'"
    return triton_backend.serves(query)


register("packed_linear", "native", native.supports(cuda=False))
register("packed_linear", "triton", _triton_serves)
register("packed_linear", "reference", lambda query: None)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed_linear(
    x: Tensor, data: Tensor, format: str, out_features: int, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """x @ W.T + bias with a packed W (`foveate.quantization.panels` has the layout, `nn.PackedLinear` makes it).

    x: [..., in], fp32, bf16 or fp16. data: int8 [bytes]. bias: fp32 [out] or None. Returns [..., out] in x's dtype, rounded once.
    Block formats: x is rounded to int8 for each block of 32, x ~ dx * q with dx = max|x| / 127, and products of a block are added
    up as integers, blocks in fp32. bf16: x is rounded to bf16. f32, f16, f8, nf4, fp4: x as it is, in fp32. Not finite x: the outputs of
    its row are not finite.
    Differentiable in x, with W in fp32, in both modes; a bias that requires a gradient is refused. Raises TypeError and ValueError.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}; it must be float32, bfloat16 or float16: convert it with x.to(...)")
    if x.dim() == 0:
        raise ValueError("x has no dimensions; packed_linear needs at least the one of in_features")
    if format not in FLOATS:
        block, _ = block_size(format)
        if x.shape[-1] % block:
            raise ValueError(f"x has {x.shape[-1]} features; {format} needs a multiple of {block}")
    expected = packed_bytes(format, x.shape[-1], out_features)
    if data.dtype is not torch.int8 or data.dim() != 1 or data.numel() != expected:
        raise ValueError(
            f"data is {data.dtype} of shape {list(data.shape)}; x with {x.shape[-1]} features and out_features={out_features} in {format} "
            f"need int8 [{expected}]"
        )
    if bias is not None and (bias.dtype is not torch.float32 or tuple(bias.shape) != (out_features,)):
        raise ValueError(f"bias is {bias.dtype} of shape {list(bias.shape)}; it must be float32 [{out_features}]")
    for name, t in (("data", data), ("bias", bias)):
        if t is not None:
            check_same_device(name, t, "x", x)
    flops.register()
    preferred, how = check_backend_name(backend), autograd.way(x, data)
    if how == "definition":
        return _with_tangent(x, data, format, out_features, bias, preferred)
    if bias is not None and autograd.is_tracked(bias):
        raise ValueError(
            "bias requires a gradient, which packed_linear does not compute; add it afterwards, or pass bias.detach()"
        )
    return autograd.run(how, _run, _packed_linear, _PackedLinear, x, data, format, out_features, bias, preferred)


def _run(x: Tensor, data: Tensor, format: str, out_features: int, bias: Tensor | None, backend: str) -> Tensor:
    backend = chosen_backend("packed_linear", x, backend, (format,))
    if backend == "reference":
        return _reference(x, data, format, out_features, bias)
    out = _fake(x, data, format, out_features, bias, backend)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    rows = rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()
    bias = None if bias is None else bias.contiguous()
    if backend == "triton":
        from foveate.backend.triton.packed_linear import packed_linear as triton_packed_linear

        triton_packed_linear(rows, data, format, bias, out.view(len(rows), out_features))
        return out
    _C.packed_linear(rows, data, format, bias, out.view(len(rows), out_features), torch.get_num_threads())
    return out


def _reference(x: Tensor, data: Tensor, format: str, out_features: int, bias: Tensor | None) -> Tensor:
    rounded = x.float()
    if format == "bf16":
        rounded = rounded.bfloat16().float()
    elif format not in (*FLOATS, *ON_FLOATS):
        q, dx = quantize_activations(rounded)
        rounded = (q * dx[..., None]).flatten(-2)
    weight = unpack_weight(data, format, x.shape[-1], out_features)
    return F.linear(rounded, weight, bias).to(x.dtype)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """q [..., in / 32, 32], integers in fp32, and dx [..., in / 32], of fp32 x [..., in]: x ~ q * dx. dx is NaN where x is not finite."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    # 127 / largest would be a reciprocal times 127 in torch, which rounds twice: some elements would fall to another integer.
    inverse = torch.full_like(largest, 127) / largest
    q = (blocks * torch.where(largest > 2.0**-100, inverse, 0)[..., None]).round()
    return torch.where(q.isfinite(), q, 0), largest / 127 + (blocks * 0).sum(-1)


def _fake(x: Tensor, data: Tensor, format: str, out_features: int, bias: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_packed_linear = library.define(
    "packed_linear(Tensor x, Tensor data, str format, SymInt out_features, Tensor? bias, str backend) -> Tensor",
    impl=_run,
    fake=_fake,
)


def _vmap(
    info: Any, in_dims: Any, x: Tensor, data: Tensor, format: str, out_features: int, bias: Any, backend: str
) -> Any:
    if in_dims[1] is not None or in_dims[4] is not None:
        raise ValueError("packed_linear maps x only; data and bias belong to one layer")
    return _packed_linear(x.movedim(in_dims[0], 0), data, format, out_features, bias, backend), 0


library.vmap("packed_linear", _vmap)


class _PackedLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, data: Tensor, format: str, out_features: int, bias: Tensor | None, backend: str) -> Tensor:
        return _packed_linear(x, data, format, out_features, bias, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, data, ctx.format, ctx.out_features, _, _ = inputs
        ctx.in_features = x.shape[-1]
        ctx.save_for_backward(data)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (data,) = ctx.saved_tensors
        args = (dout, data, ctx.format, ctx.in_features, ctx.out_features)
        dx = differentiable(_input_gradient, _input_gradient, *args)
        return dx, None, None, None, None, None


def _input_gradient(dout: Tensor, data: Tensor, format: str, in_features: int, out_features: int) -> Tensor:
    weight = unpack_weight(data, format, in_features, out_features)
    return (dout.float() @ weight).to(dout.dtype)


def _with_tangent(x: Tensor, data: Tensor, format: str, out_features: int, bias: Tensor | None, backend: str) -> Tensor:
    """The op with derivatives that torch knows in every mode: those of x @ W.T + bias with W in fp32, as in the reverse pass."""
    linear = F.linear(x.float(), unpack_weight(data, format, x.shape[-1], out_features), bias)
    out = _packed_linear(x.detach(), data, format, out_features, None if bias is None else bias.detach(), backend)
    return out + (linear - linear.detach()).to(out.dtype)


def packed_rows(data: Tensor, format: str, in_features: int, out_features: int, ids: Tensor) -> Tensor:
    """The rows `ids`, int64 [...], of a packed weight as fp32 [..., in]. IndexError for an id outside 0..out_features - 1 on the CPU."""
    chosen = choose("packed_linear", Query(data.device.type, torch.float32, (format,)), None)
    if chosen == "reference":
        return unpack_rows(data, format, in_features, out_features, ids)
    out = torch.empty((*ids.shape, in_features), device=data.device)
    if chosen == "triton":
        from foveate.backend.triton.packed_linear import weight_rows

        weight_rows(ids.reshape(-1).contiguous(), data, format, out.view(-1, in_features), out_features)
        return out
    _C.packed_rows(
        data, format, in_features, out_features, ids.reshape(-1).contiguous(), out.view(-1, in_features),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
