"""Blocks for what other libraries' files hold: integers with a zero point or an fp32 scale, 8-bit floats, and codes for floats.

A block is 32 or 64 neighbouring weights of a row, its numbers first (d and m as given, z fp16):
    q4_z      20 bytes for 32: d fp16, z, 16 bytes of nibbles q as q4_0's                        w = d * (q - z)
    q8_z      38 bytes for 32: d fp32, z, 32 bytes q of 0..255                                   w = d * (q - z)
    q8_m      36 bytes for 32: d fp16, m fp16, 32 bytes q of 0..255                              w = d * q + m
    f8        68 bytes for 64: d fp32, 64 bytes of e4m3 floats q                                 w = d * q
    nf4, fp4  36 bytes for 64: d fp32, 32 bytes of nibbles, the first of two the high one        w = d * t[q], t of 16 floats
Rows that meet f8, nf4 and fp4 stay floats; for the others they are rounded to int8 for each 32, as for GGUF's blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_PANEL = 32
# What the nibbles stand for in bitsandbytes: quantiles of a normal distribution (QLoRA, Dettmers et al. 2023), and e2m1 over 12.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))


class ScaledFormat(NamedTuple):
    """block: weights that share a scale. second: whether an fp16 z or m follows d. table: what nibbles stand for, if not integers."""

    block: int
    scale: torch.dtype
    second: bool
    code_bytes: int
    table: tuple[float, ...] = ()

    @property
    def header_bytes(self) -> int:
        return self.scale.itemsize + 2 * self.second

    @property
    def block_bytes(self) -> int:
        return self.header_bytes + self.code_bytes


SCALED = {
    "q4_z": ScaledFormat(32, torch.float16, True, 16), "q8_z": ScaledFormat(32, torch.float32, True, 32),
    "q8_m": ScaledFormat(32, torch.float16, True, 32), "f8": ScaledFormat(64, torch.float32, False, 64),
    "nf4": ScaledFormat(64, torch.float32, False, 32, NF4), "fp4": ScaledFormat(64, torch.float32, False, 32, FP4),
}  # fmt: skip
ON_FLOATS = ("f8", "nf4", "fp4")  # formats whose products take rows as floats


def join(format: str, codes: Tensor, scale: Tensor, second: Tensor | None = None) -> Tensor:
    """Blocks uint8 [out, bytes] of the bytes of codes, uint8 [out, blocks * code bytes], and numbers [out, blocks]."""
    f, out = SCALED[format], len(codes)
    parts = [_bytes(scale.to(f.scale)).view(out, -1, f.scale.itemsize)]
    if second is not None:
        parts.append(_bytes(second.half()).view(out, -1, 2))
    return torch.cat([*parts, codes.view(out, -1, f.code_bytes)], 2).view(out, -1)


def nibbles_of(q: Tensor) -> Tensor:
    """The bytes uint8 [out, in / 2] of q4_z, of q uint8 [out, in] of 0..15."""
    halves = q.unflatten(1, (-1, 2, 16))
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def dequantize_scaled(blocks: Tensor, format: str) -> Tensor:
    """fp32 [out, in] of blocks uint8 [out, bytes]."""
    d, second, codes = _split(blocks.reshape(-1, SCALED[format].block_bytes), format)
    return _values(d, second, codes, format).view(len(blocks), -1)


def _split(blocks: Tensor, format: str) -> tuple[Tensor, Tensor | None, Tensor]:
    f = SCALED[format]
    d, second, codes = blocks.split([f.scale.itemsize, 2 * f.second, f.code_bytes], 1)
    return d.contiguous().view(f.scale), second.contiguous().view(torch.float16) if f.second else None, codes


def _values(d: Tensor, second: Tensor | None, codes: Tensor, format: str) -> Tensor:
    """fp32 [n, block] of d [n, 1], second [n, 1], codes [n, code bytes]."""
    f, scale = SCALED[format], d.float()
    if format == "f8":
        return scale * codes.contiguous().view(torch.float8_e4m3fn).float()
    if f.table:
        q = torch.stack([codes >> 4, codes & 15], 2).flatten(1)
        return scale * torch.tensor(f.table, device=codes.device)[q.long()]
    offset = 0 if second is None else second.float()
    q = torch.cat([codes & 15, codes >> 4], 1) if f.code_bytes < f.block else codes
    if format == "q8_m":
        return scale * q.float() + offset
    return scale * (q.float() - offset)


def panel_bytes(format: str, in_features: int) -> int:
    """The bytes of a panel of 32 features."""
    f = SCALED[format]
    return _PANEL * f.block_bytes * (in_features // f.block)


def pack_scaled(blocks: Tensor, format: str) -> Tensor:
    """Blocks uint8 [out, bytes] as the bytes (int8) of panels (csrc/contract/linear.h has the layout)."""
    f = SCALED[format]
    blocks = F.pad(blocks, (0, 0, 0, -len(blocks) % _PANEL))
    lanes = blocks.view(len(blocks) // _PANEL, _PANEL, -1, f.block_bytes).transpose(1, 2)  # [panels, blocks, 32, bytes]
    panels, count = lanes.shape[:2]
    d, second, codes = lanes.split([f.scale.itemsize, 2 * f.second, f.code_bytes], 3)
    if f.block == 32:
        codes = codes.unflatten(3, (f.code_bytes // 4, 4)).transpose(2, 3)  # [.., groups, 32, 4]
    elif format == "f8":
        codes = codes.transpose(2, 3)
    else:
        q = torch.stack([codes >> 4, codes & 15], 4).flatten(3).transpose(2, 3)  # [.., 64, 32]
        codes = q[..., :16] | q[..., 16:] << 4
    parts = [part.reshape(panels, count, -1) for part in (codes, d, second)]
    return torch.cat(parts, 2).view(-1).view(torch.int8)


def unpack_scaled_rows(data: Tensor, format: str, in_features: int, panel: Tensor, lane: Tensor) -> Tensor:
    """fp32 [n, in] of the features (panel, lane), int64 [n] each."""
    f = SCALED[format]
    blocks = data.view(torch.uint8).view(-1, in_features // f.block, _PANEL * f.block_bytes)
    codes, d, second = blocks.split([_PANEL * f.code_bytes, _PANEL * f.scale.itemsize, _PANEL * 2 * f.second], 2)
    if f.block == 32:
        found = codes.unflatten(2, (f.code_bytes // 4, _PANEL, 4))[panel, :, :, lane].flatten(2)
    elif format == "f8":
        found = codes.unflatten(2, (f.block, _PANEL))[panel, :, :, lane]
    else:
        pairs = codes.unflatten(2, (f.block, 16))[panel, :, :, lane % 16]  # [n, blocks, 64]
        q = torch.where((lane < 16)[:, None, None], pairs & 15, pairs >> 4)
        found = q[..., ::2] << 4 | q[..., 1::2]
    numbers = [
        part.unflatten(2, (_PANEL, -1))[panel, :, lane].reshape(-1, size)
        for part, size in ((d, f.scale.itemsize), (second, 2))
        if part.shape[2]
    ]
    rows = torch.cat([*numbers, found.reshape(-1, f.code_bytes)], 1)
    return dequantize_scaled(rows.view(len(panel), -1), format)
