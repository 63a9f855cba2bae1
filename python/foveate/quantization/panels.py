"""The memory layout of packed weights: panels of 32 output features, the last one padded with zeros. In and out of it.

    f32, f16     [panels, in, 32]                                    float32, float16
    bf16         [panels, in / 2 rounded up, 32, 2]                  pairs of neighbours along `in`
    q4_0, q4_1   [panels, in / 32] blocks of: nibbles [4, 32, 4] bytes, d fp16 [32], q4_1 also m fp16 [32]
                 byte (p, feature, j) holds elements 4 p + j (low nibble) and 16 + 4 p + j (high) of the feature's block
    q8_0         [panels, in / 32] blocks of: q + 128 as uint8 [8, 32, 4], d fp16 [32]

    q2_k, q4_k, q5_k, q6_k   [panels, in / 256] super-blocks, see `foveate.quantization.k_blocks`
    q4_z, q8_z, q8_m   [panels, in / 32] blocks of: q as q4_0's or q8_0's without the 128, d [32], z or m fp16 [32]
    f8, nf4, fp4       [panels, in / 64] blocks of: e4m3 [64, 32] or nibbles [64, 16] (features i and 16 + i), d fp32 [32]

So 64 bytes are 16 features times 4 neighbours along `in`: one operand of the VNNI dot product, features in the lanes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.quantization.gguf_blocks import BLOCK, FORMATS, check_format, dequantize
from foveate.quantization.k_blocks import K_FORMATS, SUPER_BLOCK, pack_k, unpack_k_rows
from foveate.quantization.scaled_blocks import SCALED, pack_scaled, panel_bytes, unpack_scaled_rows

PANEL = 32
FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def block_bytes(format: str) -> int:
    """Bytes of the 32 blocks of a panel that share their elements of `in`."""
    return PANEL * FORMATS[format].block_bytes


def packed_bytes(format: str, in_features: int, out_features: int) -> int:
    panels = -(-out_features // PANEL)
    if format == "f32":
        return panels * PANEL * 4 * in_features
    if format == "f16":
        return panels * PANEL * 2 * in_features
    if format == "bf16":
        return panels * PANEL * 4 * (-(-in_features // 2))
    if format in K_FORMATS:
        return panels * PANEL * K_FORMATS[format].panel_bytes * (in_features // SUPER_BLOCK)
    if format in SCALED:
        return panels * panel_bytes(format, in_features)
    check_format(format)
    return panels * (in_features // BLOCK) * block_bytes(format)


def pack_floats(weight: Tensor, format: str) -> Tensor:
    """weight [out, in] as the bytes (int8) of panels in `format`, one of FLOATS."""
    out, inner = weight.shape
    weight = weight.to(FLOATS[format])
    pair = 2 if format == "bf16" else 1
    weight = F.pad(weight, (0, -inner % pair, 0, -out % PANEL))
    panels = weight.view(-1, PANEL, weight.shape[1] // pair, pair).transpose(1, 2)
    return panels.contiguous().view(-1).view(torch.int8)


def pack_blocks(blocks: Tensor, format: str) -> Tensor:
    """GGUF blocks uint8 [out, bytes] as the bytes (int8) of panels."""
    if format in K_FORMATS:
        return pack_k(blocks, format)
    if format in SCALED:
        return pack_scaled(blocks, format)
    f = check_format(format)
    blocks = F.pad(blocks, (0, 0, 0, -len(blocks) % PANEL))
    blocks = blocks.view(len(blocks) // PANEL, PANEL, -1, f.block_bytes).transpose(1, 2)  # [panels, in / 32, 32, bytes]
    panels, count = blocks.shape[:2]
    headers, quants = blocks[..., : 2 * f.headers], blocks[..., 2 * f.headers :]
    quants = quants.unflatten(-1, (f.quant_bytes // 4, 4)).transpose(2, 3)  # [.., groups, 32, 4]
    if f.quant_bytes == BLOCK:
        quants = quants ^ 128
    headers = headers.unflatten(-1, (f.headers, 2)).transpose(2, 3)  # [.., headers, 32, 2]
    return (
        torch.cat([quants.reshape(panels, count, -1), headers.reshape(panels, count, -1)], 2).view(-1).view(torch.int8)
    )


def unpack_rows(data: Tensor, format: str, in_features: int, out_features: int, ids: Tensor) -> Tensor:
    """fp32 [..., in] of the rows `ids` int64 [...], each in [0, out_features); elsewhere than on the CPU they are cut off there."""
    flat = ids.reshape(-1)
    if not flat.is_cpu:  # to check them would be to wait for the device
        flat = flat.clamp(0, out_features - 1)
    elif flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < out_features:
        raise IndexError(f"ids must be in [0, {out_features}); they span {int(flat.min())} to {int(flat.max())}")
    panel, lane = flat // PANEL, flat % PANEL
    if format in ("f32", "f16"):
        rows = data.view(FLOATS[format]).view(-1, in_features, PANEL)[panel, :, lane].float()
    elif format == "bf16":
        pairs = data.view(torch.bfloat16).view(-1, -(-in_features // 2), PANEL, 2)
        rows = pairs[panel, :, lane].flatten(1)[:, :in_features].float()
    elif format in K_FORMATS:
        rows = unpack_k_rows(data, format, in_features, panel, lane)
    elif format in SCALED:
        rows = unpack_scaled_rows(data, format, in_features, panel, lane)
    else:
        f = check_format(format)
        blocks = data.view(torch.uint8).view(-1, in_features // BLOCK, block_bytes(format))
        end = PANEL * f.quant_bytes
        quants = blocks[..., :end].unflatten(-1, (f.quant_bytes // 4, PANEL, 4))[panel, :, :, lane].flatten(2)
        headers = blocks[..., end:].unflatten(-1, (f.headers, PANEL, 2))[panel, :, :, lane].flatten(2)
        if f.quant_bytes == BLOCK:
            quants = quants ^ 128
        rows = dequantize(torch.cat([headers, quants], 2).flatten(1), format)
    return rows.view(*ids.shape, in_features)


def unpack_weight(data: Tensor, format: str, in_features: int, out_features: int) -> Tensor:
    """fp32 [out, in]."""
    return unpack_rows(data, format, in_features, out_features, torch.arange(out_features, device=data.device))
