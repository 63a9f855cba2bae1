"""foveate.nn.PackedLinear: a linear layer with a packed, frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.ops.packed_linear import packed_linear, packed_rows
from foveate.quantization.gguf_blocks import block_size, quantize
from foveate.quantization.panels import FLOATS, pack_blocks, pack_floats, unpack_weight


class PackedLinear(torch.nn.Module):
    """y = x @ W.T + bias with a packed, frozen W. No gradient reaches W; x gets dy @ W.

    format "f32", "bf16", "f16"; "q8_0", "q4_0", "q4_1", "iq4_nl", "mxfp4" (`foveate.quantization.gguf_blocks`); "q2_k", "q4_k", "q5_k",
    "q6_k", "iq4_xs", "q8_k" (`...k_blocks`); "q4_z", "q8_z", "q8_m", "f8", "nf4", "fp4" (`...scaled_blocks`).
    With "f8", "nf4" and "fp4" x stays fp32. With the other block formats x is rounded to int8 for each block of 32 as well, one fp32 scale
    max|x| / 127 each; products are exact, sums are fp32. With "bf16" x is rounded to bf16.
    A row of y has the same bits whatever the other rows, their number and the number of threads are.

    data: int8, the packed bytes (csrc/contract/linear.h has the layout), a buffer. bias: fp32 [out] or None, a buffer.
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
    def from_linear(
        linear: torch.nn.Linear, format: str | None = None, importance: Tensor | None = None
    ) -> PackedLinear:
        """format None: "f32", "bf16" or "f16" after the weight's dtype. Those of `quantize` quantise the weight; importance: see there."""
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
        return PackedLinear.from_blocks(quantize(weight, format, importance), format, linear.in_features, linear.bias)

    @staticmethod
    def from_blocks(blocks: Tensor, format: str, in_features: int, bias: Tensor | None = None) -> PackedLinear:
        """blocks: uint8 [out, blocks of a row * block bytes], as `foveate.quantization.gguf_blocks.quantize` and GGUF files have them."""
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
        return packed_rows(self.data, self.format, self.in_features, self.out_features, ids)

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
        if bias is not None and self.bias is not None:
            self.bias = bias.to(self.bias.device)
        return self
