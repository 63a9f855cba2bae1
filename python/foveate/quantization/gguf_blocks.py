"""Quantised weights in the blocks of GGUF files: `quantize`, `dequantize`, and `packed_linear`, the product with packed weights.

Block formats, 32 neighbouring weights of a row each, little-endian (the GGUF file format; d and m are fp16):
    q8_0  34 bytes: d, 32 int8 q                     w = d * q
    q4_0  18 bytes: d, 16 bytes of nibbles q         w = d * (q - 8)
    q4_1  20 bytes: d, m, 16 bytes of nibbles q      w = d * q + m
Byte i of the nibbles holds element i (low) and element i + 16 (high). `foveate.quantization.k_blocks` has q4_k, q5_k and q6_k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.quantization.k_blocks import K_FORMATS, SUPER_BLOCK, dequantize_k

BLOCK = 32


class Format(NamedTuple):
    """How a block lies in memory: fp16 numbers in front, then bytes of quants. `bias`: what is subtracted from a stored q."""

    headers: int  # 1: d, 2: d and m
    quant_bytes: int
    bias: int

    @property
    def block_bytes(self) -> int:
        return 2 * self.headers + self.quant_bytes


FORMATS = {"q8_0": Format(1, 32, 0), "q4_0": Format(1, 16, 8), "q4_1": Format(2, 16, 0)}


def check_format(format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not a block format; choose one of {', '.join(FORMATS)}")
    return FORMATS[format]


def block_size(format: str) -> tuple[int, int]:
    """(weights, bytes) of a block as files store it; ValueError for what is no block format."""
    if format in K_FORMATS:
        return SUPER_BLOCK, K_FORMATS[format].block_bytes
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not a block format; choose one of {', '.join([*FORMATS, *K_FORMATS])}")
    return BLOCK, FORMATS[format].block_bytes


def quantize(weight: Tensor, format: str) -> Tensor:
    """The blocks of `weight` [out, in], floating, as uint8 [out, in // 32 * block bytes], bit-equal to the `gguf` library's.

    format: "q8_0" (d = max|w| / 127, q = w / d rounded, halves away from zero) or "q4_0" (d = w / -8 of the w of largest magnitude,
    q = floor(w / d + 8.5), at most 15). Raises ValueError for another format or shape, and for weights that are not finite.
    """
    if format not in ("q8_0", "q4_0"):
        raise ValueError(f"format={format!r} cannot be quantised to; choose q8_0 or q4_0")
    if weight.dim() != 2 or weight.shape[1] % BLOCK:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [out, in] with in a multiple of {BLOCK}")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}; it must be floating point")
    blocks = weight.detach().float().reshape(-1, BLOCK)
    if not blocks.isfinite().all():
        raise ValueError("weight has elements that are not finite; they cannot be quantised")
    magnitude = blocks.abs()
    if format == "q8_0":
        d = magnitude.amax(1, keepdim=True) / 127
        scaled = blocks * torch.where(d == 0, 0, 1 / d)
        rounded = scaled.abs().floor()
        rounded = rounded + (2 * (scaled.abs() - rounded)).floor()
        quants = (scaled.sign() * rounded).to(torch.int8).view(torch.uint8)
    else:
        # The first of several elements of the largest magnitude counts: it gives d its sign.
        columns = torch.arange(BLOCK, device=blocks.device)
        first = torch.where(magnitude == magnitude.amax(1, keepdim=True), columns, BLOCK).amin(1, keepdim=True)
        d = blocks.gather(1, first) / -8
        q = (blocks * torch.where(d == 0, 0, 1 / d) + 8.5).trunc().clamp(0, 15).to(torch.uint8)
        quants = q[:, :16] | q[:, 16:] << 4
    return torch.cat([d.half().view(torch.uint8), quants], 1).view(len(weight), -1)


def dequantize(blocks: Tensor, format: str) -> Tensor:
    """fp32 [out, in] of the blocks uint8 [out, blocks * block bytes] of a block format, bit-equal to the `gguf` library's."""
    _, size = block_size(format)
    if blocks.dtype is not torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % size:
        raise ValueError(
            f"blocks is {blocks.dtype} of shape {list(blocks.shape)}; {format} needs uint8 [out, blocks * {size} bytes]"
        )
    if format in K_FORMATS:
        return dequantize_k(blocks, format)
    f = FORMATS[format]
    rows = blocks.reshape(-1, f.block_bytes)
    headers = rows[:, : 2 * f.headers].contiguous().view(torch.float16).float()
    q = rows[:, 2 * f.headers :]
    q = (
        q.contiguous().view(torch.int8)
        if f.quant_bytes == BLOCK
        else torch.cat([q & 15, q >> 4], 1).to(torch.int8) - f.bias
    )
    w = headers[:, :1] * q.float()
    if f.headers == 2:
        w += headers[:, 1:]
    return w.view(len(blocks), -1)
