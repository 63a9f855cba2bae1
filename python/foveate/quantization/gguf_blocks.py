"""Quantised weights in the blocks of GGUF files: `quantize`, `dequantize`, and `packed_linear`, the product with packed weights.

Block formats, 32 neighbouring weights of a row each, little-endian (the GGUF file format; d and m are fp16):
    q8_0  34 bytes: d, 32 int8 q                     w = d * q
    q4_0  18 bytes: d, 16 bytes of nibbles q         w = d * (q - 8)
    q4_1  20 bytes: d, m, 16 bytes of nibbles q      w = d * q + m
    iq4_nl, mxfp4  18 bytes: d, 16 bytes of nibbles q    w = d * t[q], each with its table t of 16 integers
mxfp4 is what MXFP4 becomes, whose blocks in files have a byte e, d = 2**(e - 128), in place of an fp16.
Byte i of the nibbles holds element i (low) and element i + 16 (high). `foveate.quantization.k_blocks` has the K-quants,
`foveate.quantization.scaled_blocks` the blocks for other libraries' files.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.quantization.k_blocks import IQ4_NL, K_FORMATS, SUPER_BLOCK, dequantize_k
from foveate.quantization.names import QUANTISABLE, SEARCHED
from foveate.quantization.scaled_blocks import SCALED, dequantize_scaled
from foveate.quantization.searched import quantize_searched

BLOCK = 32
MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # e2m1 doubled (OCP Microscaling Formats 1.0)


class Format(NamedTuple):
    """How a block lies in memory: fp16 numbers in front, then bytes of quants. `bias`: what is subtracted from a stored q."""

    headers: int  # 1: d, 2: d and m
    quant_bytes: int
    bias: int
    table: tuple[int, ...] = ()  # the integers that nibbles stand for

    @property
    def block_bytes(self) -> int:
        return 2 * self.headers + self.quant_bytes


FORMATS = {
    "q8_0": Format(1, 32, 0), "q4_0": Format(1, 16, 8), "q4_1": Format(2, 16, 0), "iq4_nl": Format(1, 16, 0, IQ4_NL),
    "mxfp4": Format(1, 16, 0, MXFP4),
}  # fmt: skip
TABLES = tuple(name for name, format in FORMATS.items() if format.table)


def check_format(format: str) -> Format:
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not a block format; choose one of {', '.join(FORMATS)}")
    return FORMATS[format]


def block_size(format: str) -> tuple[int, int]:
    """(weights, bytes) of a block as files store it; ValueError for what is no block format."""
    if format in K_FORMATS:
        return SUPER_BLOCK, K_FORMATS[format].block_bytes
    if format in SCALED:
        return SCALED[format].block, SCALED[format].block_bytes
    if format not in FORMATS:
        known = ", ".join([*FORMATS, *K_FORMATS, *SCALED])
        raise ValueError(f"format={format!r} is not a block format; choose one of {known}")
    return BLOCK, FORMATS[format].block_bytes


def quantize(weight: Tensor, format: str, importance: Tensor | None = None) -> Tensor:
    """The blocks of `weight` [out, in], floating, as uint8 [out, blocks of a row * block bytes].

    format: "q8_0" (d = max|w| / 127, q = w / d rounded, halves away from zero) and "q4_0" (d = w / -8 of the w of largest magnitude,
    q = floor(w / d + 8.5), at most 15), bit-equal to the `gguf` library's; "q4_1", "q4_k", "q5_k", "q6_k" and "iq4_nl", whose scales are
    searched (`foveate.quantization.searched`). importance: fp32 [in], how much an error of each column costs, for those that search.
    Raises ValueError for another format or shape, and for weights that are not finite.
    """
    if format not in QUANTISABLE:
        raise ValueError(f"format={format!r} cannot be quantised to; choose one of {', '.join(QUANTISABLE)}")
    block, _ = block_size(format)
    if weight.dim() != 2 or weight.shape[1] % block:
        raise ValueError(f"weight has shape {list(weight.shape)}; it must be [out, in] with in a multiple of {block}")
    if not weight.is_floating_point():
        raise TypeError(f"weight is {weight.dtype}; it must be floating point")
    if importance is not None and tuple(importance.shape) != (weight.shape[1],):
        raise ValueError(
            f"importance has shape {list(importance.shape)}; a weight of {weight.shape[1]} columns needs [{weight.shape[1]}]"
        )
    blocks = weight.detach().float().reshape(-1, BLOCK)
    if not blocks.isfinite().all():
        raise ValueError("weight has elements that are not finite; they cannot be quantised")
    if format in SEARCHED:
        return quantize_searched(blocks.view(weight.shape), format, importance)
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


def table_to_q8_0(blocks: Tensor, format: str) -> Tensor:
    """Blocks of iq4_nl or mxfp4, uint8 [out, bytes], as those of q8_0 with the same weights."""
    d, q = blocks.reshape(-1, FORMATS[format].block_bytes).split([2, 16], 1)
    integers = torch.tensor(FORMATS[format].table, dtype=torch.int8)[torch.cat([q & 15, q >> 4], 1).long()]
    return torch.cat([d, integers.view(torch.uint8)], 1).view(len(blocks), -1)


def dequantize(blocks: Tensor, format: str) -> Tensor:
    """fp32 [out, in] of the blocks uint8 [out, blocks * block bytes] of a block format, bit-equal to the `gguf` library's."""
    _, size = block_size(format)
    if blocks.dtype is not torch.uint8 or blocks.dim() != 2 or blocks.shape[1] % size:
        raise ValueError(
            f"blocks is {blocks.dtype} of shape {list(blocks.shape)}; {format} needs uint8 [out, blocks * {size} bytes]"
        )
    if format in K_FORMATS:
        return dequantize_k(blocks, format)
    if format in SCALED:
        return dequantize_scaled(blocks, format)
    f = FORMATS[format]
    rows = blocks.reshape(-1, f.block_bytes)
    headers = rows[:, : 2 * f.headers].contiguous().view(torch.float16).float()
    q = rows[:, 2 * f.headers :]
    if f.quant_bytes == BLOCK:
        q = q.contiguous().view(torch.int8)
    else:
        q = torch.cat([q & 15, q >> 4], 1).to(torch.int8) - f.bias
    if f.table:
        q = torch.tensor(f.table, dtype=torch.int8, device=q.device)[q.long()]
    w = headers[:, :1] * q.float()
    if f.headers == 2:
        w += headers[:, 1:]
    return w.view(len(blocks), -1)
