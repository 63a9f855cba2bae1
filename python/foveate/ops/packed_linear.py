"""foveate.nn.PackedLinear: a linear layer with a packed weight, and its op. Kernel: csrc/cpu/kernels/linear.cpp."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.registry import Query, register
from foveate.ops import autograd, flops, library
from foveate.ops.autograd import differentiable
from foveate.ops.checks import chosen_backend
from foveate.quantization.gguf_blocks import BLOCK, block_size, quantize
from foveate.quantization.k_blocks import K_FORMATS
from foveate.quantization.panels import FLOATS, pack_blocks, pack_floats, packed_bytes, unpack_rows, unpack_weight

_C = native._C


def _triton_serves(query: Query) -> str | None:
    missing = [format for format in query.features if format in K_FORMATS or format == "f16"]
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
    up as integers, blocks in fp32. bf16: x is rounded to bf16. f32: x as it is. Not finite x: the outputs of its row are not finite.
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
        if t is not None and t.device != x.device:
            raise ValueError(f"{name} is on {t.device} and x on {x.device}; move one with .to(device)")
    flops.register()
    chosen = chosen_backend("packed_linear", x.device.type, x.dtype, backend, (format,))
    how = autograd.way(x)
    if how == "definition":
        return _with_tangent(x, data, format, out_features, bias, chosen)
    if bias is not None and autograd.is_tracked(bias):
        raise ValueError(
            "bias requires a gradient, which packed_linear does not compute; add it afterwards, or pass bias.detach()"
        )
    if how == "function":
        return _PackedLinear.apply(x, data, format, out_features, bias, chosen)
    return _packed_linear(x, data, format, out_features, bias, chosen)


def _run(x: Tensor, data: Tensor, format: str, out_features: int, bias: Tensor | None, backend: str) -> Tensor:
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
    elif format not in FLOATS:
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


class PackedLinear(torch.nn.Module):
    """y = x @ W.T + bias with a packed, frozen W. No gradient reaches W; x gets dy @ W.

    format "f32", "bf16", "f16", "q8_0", "q4_0", "q4_1" (see `foveate.linear`), "q4_k", "q5_k" or "q6_k" (`foveate.quantization.k_blocks`).
    With block formats x is rounded to int8 for each block of 32 as well, one fp32 scale max|x| / 127 each; products are exact, sums
    are fp32. With "bf16" x is rounded to bf16.
    A row of y has the same bits whatever the other rows, their number and the number of threads are.

    data: int8, the packed bytes (csrc/ops/linear.h has the layout), a buffer. bias: fp32 [out] or None, a buffer.
    """

    data: Tensor
    bias: Tensor | None

    def __init__(
        self, data: Tensor, format: str, in_features: int, out_features: int, bias: Tensor | None = None
    ) -> None:
        super().__init__()
        self.format, self.in_features, self.out_features = format, in_features, out_features
        self.register_buffer("data", data)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    @staticmethod
    def from_linear(linear: torch.nn.Linear, format: str | None = None) -> PackedLinear:
        """format None: "f32", "bf16" or "f16" after the weight's dtype. "q8_0" and "q4_0" quantise the weight."""
        weight = linear.weight.detach()
        if format is None:
            format = next((name for name, dtype in FLOATS.items() if dtype is weight.dtype), None)
            if format is None:
                raise TypeError(
                    f"the weight is {weight.dtype}; give a format, or convert it to float32, bfloat16 or float16"
                )
        if format in FLOATS:
            data = pack_floats(weight, format)
            return PackedLinear(data, format, linear.in_features, linear.out_features, linear.bias)
        return PackedLinear.from_blocks(quantize(weight, format), format, linear.in_features, linear.bias)

    @staticmethod
    def from_blocks(blocks: Tensor, format: str, in_features: int, bias: Tensor | None = None) -> PackedLinear:
        """blocks: uint8 [out, blocks of a row * block bytes], as `foveate.linear.quantize` and GGUF files have them."""
        block, size = block_size(format)
        if in_features % block or in_features < block:
            raise ValueError(f"in_features={in_features} must be a multiple of {block} for {format}")
        row = in_features // block * size
        if blocks.dtype is not torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != row:
            raise ValueError(
                f"blocks is {blocks.dtype} of shape {list(blocks.shape)}; {format} with in_features={in_features} needs uint8 [out, {row}]"
            )
        if bias is not None and tuple(bias.shape) != (len(blocks),):
            raise ValueError(f"bias has shape {list(bias.shape)}; blocks of {len(blocks)} rows need [{len(blocks)}]")
        return PackedLinear(pack_blocks(blocks, format), format, in_features, len(blocks), bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in], fp32, bf16 or fp16 -> [..., out] in x's dtype."""
        return packed_linear(x, self.data, self.format, self.out_features, self.bias)

    def dequantize(self) -> Tensor:
        """fp32 [out, in]."""
        return unpack_weight(self.data, self.format, self.in_features, self.out_features)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids`, int64 [...], of the weight as fp32 [..., in]: an embedding that is tied to this layer.

        Raises IndexError for an id outside 0..out_features - 1. On a GPU, where that would wait for the device, it is cut off there.
        """
        chosen = chosen_backend("packed_linear", self.data.device.type, torch.float32, None, (self.format,))
        if chosen == "reference":
            return unpack_rows(self.data, self.format, self.in_features, self.out_features, ids)
        out = torch.empty((*ids.shape, self.in_features), device=self.data.device)
        if chosen == "triton":
            from foveate.backend.triton.packed_linear import weight_rows

            weight_rows(
                ids.reshape(-1).contiguous(), self.data, self.format, out.view(-1, self.in_features), self.out_features
            )
            return out
        _C.packed_rows(
            self.data, self.format, self.in_features, self.out_features, ids.reshape(-1).contiguous(), out.view(-1, self.in_features),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, format={self.format!r}"

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        # .to(dtype) must leave the bias in fp32, which the kernel reads; only the device changes.
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None:
            assert self.bias is not None
            self.bias = bias.to(self.bias.device)
        return self
