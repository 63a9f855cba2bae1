"""Rotary position embedding: one program rotates some heads of one token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import on_device
from .tiles import to


@triton.jit(do_not_specialize=["S", "H"])
def rotary_heads(
    x, cos, sin, out, x_strides, cos_strides, sin_strides, S, H, D: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_REST: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """x [B, S, H, D] by its strides, out contiguous; cos, sin by (batch, position) strides. HALF pairs are rotated, the rest copied."""
    token = tl.program_id(0)
    b, s = (token // S).to(tl.int64), (token % S).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_C)
    row = x + b * x_strides[0] + s * x_strides[1] + h.to(tl.int64)[:, None] * x_strides[2]
    target = out + (token.to(tl.int64) * H + h)[:, None] * D
    valid = (h < H)[:, None]
    pair = valid & (c < HALF)[None, :]
    if INTERLEAVED:
        first, second = 2 * c[None, :], 2 * c[None, :] + 1
    else:
        first, second = c[None, :], c[None, :] + HALF
    a1 = tl.load(row + first, mask=pair, other=0.0).to(tl.float32)
    a2 = tl.load(row + second, mask=pair, other=0.0).to(tl.float32)
    cosine = tl.load(cos + b * cos_strides[0] + s * cos_strides[1] + c, mask=c < HALF, other=1.0).to(tl.float32)[
        None, :
    ]
    sine = tl.load(sin + b * sin_strides[0] + s * sin_strides[1] + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sine = -sine
    tl.store(target + first, to(a1 * cosine - a2 * sine, out.dtype.element_ty), mask=pair)
    tl.store(target + second, to(a2 * cosine + a1 * sine, out.dtype.element_ty), mask=pair)
    if BLOCK_REST > 0:
        r = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        rest = valid & (r < D)
        tl.store(target + r, tl.load(row + r, mask=rest, other=0.0), mask=rest)


@on_device
def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, interleaved: bool, inverse: bool) -> None:
    """x [B, S, H, D], cos and sin [S, rot / 2] or [B, S, rot / 2], last dims of stride 1; out contiguous."""
    if x.numel() == 0:
        return
    B, S, H, D = x.shape
    half = cos.shape[-1]
    tables = [(t.stride(0) if t.dim() == 3 else 0, t.stride(-2)) for t in (cos, sin)]
    pairs = max(1, triton.next_power_of_2(half))
    heads = min(triton.next_power_of_2(H), max(1, 2048 // pairs))
    rest = triton.next_power_of_2(D - 2 * half) if 2 * half < D else 0
    rotary_heads[(B * S, -(-H // heads))](
        x, cos, sin, out, x.stride()[:3], *tables, S, H, D=D, HALF=half, BLOCK_H=heads, BLOCK_C=pairs, BLOCK_REST=rest,
        INTERLEAVED=interleaved, INVERSE=inverse,
    )  # fmt: skip
