"""GGUF's K-quants: super-blocks of 256 weights with quantised scales. Reading them, and their place in the panels of packed weights.

With d and dmin fp16, sc and mn integers of each sub-block, and q integers (the GGUF file format, llama.cpp's ggml-common.h):
    q2_k  84 bytes: sc and mn of 4 bits for each 16 weights, q of 2 bits, d, dmin        w = d sc q - dmin mn
    q4_k  144 bytes: d, dmin, sc and mn of 6 bits for each 32 weights, q of 4 bits       w = d sc q - dmin mn
    q5_k  176 bytes: the same with q of 5 bits
    q6_k  210 bytes: q of 6 bits, sc int8 for each 16 weights, d                         w = d sc (q - 32)
    iq4_xs  136 bytes: d, sc of 6 bits for each 32 weights, q of 4 bits                  w = d (sc - 32) t[q], t as of iq4_nl
    q8_k  276 bytes, in no file: d fp32, sc int8 for each 16 weights, q int8                  w = d sc q
The codebooks of IQ1, IQ2 and IQ3 become q8_k, and q3_k (110 bytes: q of 3 bits, sc of 6 bits for each 16 weights, d) becomes q6_k by
`q3_to_q6`, without a change of any weight.

In a panel of 32 features, each super-block of 256 input features is 8 blocks of 32 and then d and dmin, fp16 [32] each (of q8_k fp32):
    q2_k  [2, 32, 4] bytes, of which bits 2 p and 2 p + 1 of byte (half, feature, j) are element 16 half + 4 p + j; [2, 32] bytes of the
          two halves, sc in the low nibble and mn in the high one
    q4_k  nibbles [4, 32, 4] bytes as q4_0's; sc [32], mn [32] bytes
    q5_k  nibbles; [32, 4] bytes, of which bit p of byte (feature, j) is the fifth bit of element 4 p + j and bit p + 4 that of
          16 + 4 p + j; sc, mn
    q6_k  nibbles; [2, 32, 4] bytes, of which bits 2 p and 2 p + 1 of byte (half, feature, j) are the upper bits of element
          16 half + 4 p + j; sc int8 [2, 32], of the two halves
    iq4_xs  nibbles; sc int8 [32]
    q8_k  q + 128 as uint8 [8, 32, 4]; sc int8 [2, 32]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SUPER_BLOCK = 256
_PANEL = 32


class KFormat(NamedTuple):
    """block_bytes: of a super-block in the file; panel_bytes: of a super-block of one feature in a panel."""

    block_bytes: int
    panel_bytes: int
    scales: int  # integers for each 32 weights in a panel
    headers: int


K_FORMATS = {
    "q2_k": KFormat(84, 84, 2, 2), "q4_k": KFormat(144, 148, 2, 2), "q5_k": KFormat(176, 180, 2, 2), "q6_k": KFormat(210, 210, 2, 1),
    "iq4_xs": KFormat(136, 138, 1, 1), "q8_k": KFormat(276, 276, 2, 1),
}  # fmt: skip
# ggml-common.h's kvalues_iq4nl: what the nibbles of iq4_nl and iq4_xs stand for
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class _Parts(NamedTuple):
    """q uint8 [n, 256], mn uint8 [n, 8] or None, headers fp16 [n, 1 or 2]; sc uint8 [n, 8] or int8, of q6_k and q8_k [n, 16]. q of q8_k is
    the integer plus 128; sc and mn of q2_k are [n, 16]."""

    q: Tensor
    sc: Tensor
    mn: Tensor | None
    headers: Tensor


def dequantize_k(blocks: Tensor, format: str) -> Tensor:
    """fp32 [out, in] of super-blocks uint8 [out, in / 256 * bytes], bit-equal to the `gguf` library's."""
    return _values(_split(blocks.reshape(-1, K_FORMATS[format].block_bytes), format), format).view(len(blocks), -1)


def pack_k(blocks: Tensor, format: str) -> Tensor:
    """Super-blocks uint8 [out, bytes] as the bytes (int8) of panels."""
    blocks = F.pad(blocks, (0, 0, 0, -len(blocks) % _PANEL))
    panels = len(blocks) // _PANEL
    parts = _split(blocks.reshape(-1, K_FORMATS[format].block_bytes), format)

    def of_panels(x: Tensor) -> Tensor:
        """[n, ...] with n = panels * 32 * super-blocks -> [panels, super-blocks, ..., 32]"""
        return x.view(panels, _PANEL, -1, *x.shape[1:]).movedim(1, -1)

    q = of_panels(parts.q.view(-1, 8, 2, 4, 4))  # [.., block, half, p, j, feature]
    shifts = torch.arange(4, dtype=torch.uint8)[:, None, None]
    if format == "q2_k":
        nibbles = (q << 2 * shifts).sum(4).to(torch.uint8)
    else:
        nibbles = q.flatten(3, 4) if format == "q8_k" else (q[:, :, :, 0] & 15) | (q[:, :, :, 1] & 15) << 4
    pieces = [nibbles.transpose(-1, -2)]
    if format == "q5_k":
        fifth = (q >> 4) << shifts
        pieces.append((fifth[:, :, :, 0].sum(3) | fifth[:, :, :, 1].sum(3) << 4).to(torch.uint8).transpose(-1, -2))
    elif format == "q6_k":
        pieces.append(((q >> 4) << 2 * shifts).sum(4).to(torch.uint8).transpose(-1, -2))
    sc = parts.sc.view(torch.uint8)
    if format == "q2_k" and parts.mn is not None:
        sc = sc | parts.mn << 4
    pieces.append(of_panels(sc.reshape(len(parts.q), 8, -1)))
    if parts.mn is not None and format != "q2_k":
        pieces.append(of_panels(parts.mn))
    inner = torch.cat([piece.reshape(panels, -1, 8, piece[0, 0, 0].numel()) for piece in pieces], 3).flatten(2)
    headers = of_panels(parts.headers).contiguous().view(torch.uint8).flatten(2)
    return torch.cat([inner, headers], 2).view(-1).view(torch.int8)


def unpack_k_rows(data: Tensor, format: str, in_features: int, panel: Tensor, lane: Tensor) -> Tensor:
    """fp32 [n, in] of the features (panel, lane), int64 [n] each."""
    f = K_FORMATS[format]
    supers = data.view(torch.uint8).view(-1, in_features // SUPER_BLOCK, _PANEL * f.panel_bytes)
    count = f.headers
    size = 4 if format == "q8_k" else 2
    inner, headers = supers.split([_PANEL * (f.panel_bytes - size * count), _PANEL * size * count], 2)
    inner = inner.unflatten(2, (8, -1))
    headers = headers.unflatten(2, (count, _PANEL, size))[panel, :, :, lane].flatten(2).contiguous()
    headers = headers.view(torch.float32 if format == "q8_k" else torch.float16)
    size = {"q8_k": 1024, "q2_k": 256}.get(format, 512)
    stored, rest = inner.split([size, inner.shape[3] - size], 3)
    stored = stored.unflatten(3, (size // 128, _PANEL, 4))[
        panel, :, :, :, lane
    ]  # [n, super-blocks, 8, p, j], or all 8 p of both halves
    shifts = torch.arange(4, dtype=torch.uint8, device=data.device)[:, None]
    if format == "q2_k":
        q = (stored[:, :, :, :, None, :] >> 2 * shifts) & 3
    else:
        q = stored if format == "q8_k" else torch.stack([stored & 15, stored >> 4], 3)  # [.., half, p, j]
    if format == "q5_k":
        fifth = rest[..., :128].unflatten(3, (_PANEL, 4))[panel, :, :, lane][:, :, :, None, :]  # [.., 1, j]
        q = q | torch.stack([(fifth >> shifts) & 1, (fifth >> 4 >> shifts) & 1], 3) << 4
        rest = rest[..., 128:]
    elif format == "q6_k":
        upper = rest[..., :256].unflatten(3, (2, _PANEL, 4))[panel, :, :, :, lane]  # [.., half, j]
        q = q | ((upper[:, :, :, :, None, :] >> 2 * shifts) & 3) << 4
        rest = rest[..., 256:]
    scales = rest.unflatten(3, (f.scales, _PANEL))[panel, :, :, :, lane].reshape(-1, 8, f.scales)
    headers = headers.reshape(-1, count)
    q = q.reshape(-1, SUPER_BLOCK)
    if format == "q2_k":
        both = scales.flatten(1)
        parts = _Parts(q, both & 15, both >> 4, headers)
    elif count == 1:
        parts = _Parts(q, scales.flatten(1).contiguous().view(torch.int8), None, headers)
    else:
        parts = _Parts(q, scales[..., 0], scales[..., 1], headers)
    return _values(parts, format).view(len(panel), in_features)


def q3_to_q6(blocks: Tensor) -> Tensor:
    """Super-blocks of Q3_K, uint8 [out, in / 256 * 110], as those of Q6_K with the same weights: q of -4..3, and scales of -32..31."""
    n = blocks.reshape(-1, 110)
    masks, qs, packed, d = n.split([32, 64, 12, 2], 1)
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)  # of 16 scales
    high = torch.cat([(packed[:, 8:] >> 2 * i) & 3 for i in range(4)], 1)
    scales = (low | high << 4).to(torch.int8) - 32
    lower = torch.stack([(half >> 2 * i) & 3 for half in qs.split(32, 1) for i in range(4)], 1)  # [n, 8, 32]
    third = torch.stack([(masks >> i) & 1 for i in range(8)], 1)
    q = (lower + (third << 2) + 28).to(torch.uint8)  # 32 + lower - 4 (1 - third)
    return join_q6(q.view(-1, SUPER_BLOCK), scales, d).view(len(blocks), -1)


def join_q6(q: Tensor, scales: Tensor, d: Tensor) -> Tensor:
    """Super-blocks of q6_k: q uint8 [n, 256], scales int8 [n, 16], d as bytes [n, 2]."""
    chunks = q.view(-1, 2, 4, 32)  # of 128 weights, the quarters that share bytes of the upper bits
    lower = torch.stack([(chunks[:, :, i] & 15) | (chunks[:, :, i + 2] & 15) << 4 for i in range(2)], 2)
    upper = sum((chunks[:, :, i] >> 4) << 2 * i for i in range(4))
    return torch.cat([lower.flatten(1), upper.flatten(1), scales.view(torch.uint8), d], 1)  # type: ignore[union-attr]


def join_affine(q: Tensor, sc: Tensor, mn: Tensor, headers: Tensor, format: str) -> Tensor:
    """Super-blocks of q4_k or q5_k: q uint8 [n, 256], sc and mn uint8 [n, 8], headers fp16 [n, 2]."""
    packed = [
        sc[:, :4] | (sc[:, 4:] >> 4) << 6,
        mn[:, :4] | (mn[:, 4:] >> 4) << 6,
        (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4,
    ]
    blocks = q.view(-1, 4, 2, 32)
    nibbles = (blocks[:, :, 0] & 15) | (blocks[:, :, 1] & 15) << 4
    fifth = []
    if format == "q5_k":
        bits = torch.arange(8, dtype=torch.uint8, device=q.device)[:, None]
        fifth = [((q.view(-1, 8, 32) >> 4) << bits).sum(1).to(torch.uint8)]
    return torch.cat([headers.contiguous().view(torch.uint8), *packed, *fifth, nibbles.flatten(1)], 1)


def _values(parts: _Parts, format: str) -> Tensor:
    """fp32 [n, 256]"""
    headers = parts.headers.float()
    if parts.mn is None:
        scales = headers * parts.sc.float()
        if format == "iq4_xs":
            q = torch.tensor(IQ4_NL, dtype=torch.float32, device=parts.q.device)[parts.q.long()]
        else:
            q = parts.q.float() - (32 if format == "q6_k" else 128)
        return (scales[..., None] * q.view(len(q), scales.shape[1], -1)).flatten(1)
    scales, minima = headers[:, :1] * parts.sc.float(), headers[:, 1:] * parts.mn.float()
    q = parts.q.view(len(parts.q), scales.shape[1], -1)
    return (scales[..., None] * q.float() - minima[..., None]).flatten(1)


def _split(n: Tensor, format: str) -> _Parts:
    """The fields of super-blocks uint8 [n, bytes]."""
    if format == "q6_k":
        lower, upper, scales, d = n.split([128, 64, 16, 2], 1)
        lower, upper = lower.view(-1, 2, 2, 32), upper.view(-1, 2, 32)
        q = torch.stack(
            [(lower[:, :, i % 2] >> 4 * (i // 2) & 15) | ((upper >> 2 * i) & 3) << 4 for i in range(4)], 2
        ).flatten(1)
        return _Parts(q, scales.contiguous().view(torch.int8), None, d.contiguous().view(torch.float16))
    if format == "q2_k":
        both, quants, headers = n.split([16, 64, 4], 1)
        planes = [(half >> 2 * i) & 3 for half in quants.split(32, 1) for i in range(4)]
        return _Parts(torch.cat(planes, 1), both & 15, both >> 4, headers.contiguous().view(torch.float16))
    if format == "q8_k":
        d, scales, q = n.split([4, 16, 256], 1)
        return _Parts(q ^ 128, scales.contiguous().view(torch.int8), None, d.contiguous().view(torch.float32))
    if format == "iq4_xs":
        d, high, low, quants = n.split([2, 2, 4, 128], 1)
        upper = torch.stack([(high[:, i // 4] >> 2 * (i % 4)) & 3 for i in range(8)], 1)
        lower = torch.stack([low & 15, low >> 4], 2).flatten(1)
        quants = quants.reshape(-1, 8, 16)
        q = torch.cat([quants & 15, quants >> 4], 2).flatten(1)
        return _Parts(q, (lower | upper << 4).to(torch.int8) - 32, None, d.contiguous().view(torch.float16))
    headers, packed, quants = n[:, :4].contiguous().view(torch.float16), n[:, 4:16], n[:, 16:]
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    sc = torch.cat([a & 63, (c & 15) | (a >> 6) << 4], 1)
    mn = torch.cat([b & 63, (c >> 4) | (b >> 6) << 4], 1)
    if format == "q5_k":
        fifth, quants = quants[:, :32], quants[:, 32:]
    pairs = quants.reshape(-1, 4, 32)
    q = torch.stack([pairs & 15, pairs >> 4], 2).reshape(-1, 8, 32)
    if format == "q5_k":
        q = q | torch.stack([(fifth >> i) & 1 for i in range(8)], 1) << 4
    return _Parts(q.reshape(-1, SUPER_BLOCK), sc, mn, headers)
