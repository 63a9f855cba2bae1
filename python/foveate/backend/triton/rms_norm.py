"""rms_norm over the last dimension, with the residual added before: one program for a row; the gradient of the weight sums over shares
of the rows, in one order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device
from .rows import block_of
from .tiles import to

_MAX_SHARES = 128  # of the rows, for dweight


@triton.jit(do_not_specialize=["N"])
def rms_norm_rows(x, residual, weight, out, sum, rstd, x_stride, residual_stride, N, eps, BLOCK: tl.constexpr):
    """x [rows, N] with rows x_stride apart; out contiguous; rstd fp32 [rows] = 1 / sqrt(mean(h**2) + eps) with h = x, or, where there is
    a residual, sum = x + residual, rounded to x's dtype."""
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * N
    if residual is not None:
        residual += row * residual_stride
        sum += row * N
    step = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        a = tl.load(x + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        if residual is not None:
            a += tl.load(residual + first + step, mask=first + step < N, other=0.0).to(tl.float32)
            h = to(a, sum.dtype.element_ty)
            tl.store(sum + first + step, h, mask=first + step < N)
            a = h.to(tl.float32)
        squares += a * a
    r = 1 / tl.sqrt(tl.sum(squares, 0) / N + eps)
    tl.store(rstd + row, r)
    for first in range(0, N, BLOCK):
        y = tl.load(x + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        if residual is not None:  # the sum is not read again: another warp may have written it
            y += tl.load(residual + first + step, mask=first + step < N, other=0.0).to(tl.float32)
            y = to(y, sum.dtype.element_ty).to(tl.float32)
        y *= r
        if weight is not None:
            y *= tl.load(weight + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        tl.store(out + first + step, to(y, out.dtype.element_ty), mask=first + step < N)


@triton.jit(do_not_specialize=["N"])
def rms_norm_dx(dout, x, weight, rstd, dsum, dx, x_stride, N, BLOCK: tl.constexpr):
    """dx = rstd * (g - y * mean(g * y)) + dsum with g = weight * dout and y = x * rstd."""
    row = tl.program_id(0).to(tl.int64)
    dout += row * N
    x += row * x_stride
    dx += row * N
    if dsum is not None:
        dsum += row * N
    r = tl.load(rstd + row)
    step = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        g = tl.load(dout + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        sums += g * tl.load(x + first + step, mask=first + step < N, other=0.0).to(tl.float32) * r
    mean = tl.sum(sums, 0) / N
    for first in range(0, N, BLOCK):
        g = tl.load(dout + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        if weight is not None:
            g *= tl.load(weight + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        y = tl.load(x + first + step, mask=first + step < N, other=0.0).to(tl.float32) * r
        d = r * (g - y * mean)
        if dsum is not None:
            d += tl.load(dsum + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        tl.store(dx + first + step, to(d, dx.dtype.element_ty), mask=first + step < N)


@triton.jit(do_not_specialize=["N", "rows", "share"])
def rms_norm_dweight(dout, x, rstd, parts, x_stride, N, rows, share, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """parts [shares, N]: the sum of dout * x * rstd over the rows of each share."""
    part = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(part * share, tl.minimum(part * share + share, rows), ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < tl.minimum(part * share + share, rows)
        mask = valid[:, None] & inside[None, :]
        g = tl.load(dout + row[:, None] * N + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        a = tl.load(x + row[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row, mask=valid, other=0.0)
        sums += tl.sum(g * a * r[:, None], 0)
    tl.store(parts + part * N + columns, sums, mask=inside)


@on_device
def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, out: Tensor, sum: Tensor | None, rstd: Tensor
) -> None:
    """x and residual [rows, N] with a last dim of stride 1; out [rows, N], sum [rows, N] and rstd [rows] contiguous."""
    if x.shape[0] == 0 or x.shape[1] == 0:
        rstd.fill_(eps**-0.5 if eps > 0 else float("inf"))
        return
    block, warps = block_of(x.shape[1])
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    rms_norm_rows[(x.shape[0],)](
        x, residual, weight, out, sum, rstd, *strides, x.shape[1], eps, BLOCK=block, num_warps=warps
    )


@on_device
def rms_norm_backward(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dsum: Tensor | None,
    dx: Tensor,
    dweight: Tensor | None,
) -> None:
    rows, N = x.shape
    if rows == 0 or N == 0:
        if dweight is not None:
            dweight.zero_()
        return
    block, warps = block_of(N)
    rms_norm_dx[(rows,)](dout, x, weight, rstd, dsum, dx, x.stride(0), N, BLOCK=block, num_warps=warps)
    if dweight is not None:
        shares = min(_MAX_SHARES, -(-rows // 16))
        share = -(-rows // shares)
        parts = torch.empty((shares, N), dtype=torch.float32, device=x.device)
        width = min(128, block)
        rms_norm_dweight[(shares, -(-N // width))](
            dout, x, rstd, parts, x.stride(0), N, rows, share, ROWS=16, BLOCK=width
        )
        torch.sum(parts, 0, out=dweight)
