"""softmax and log_softmax over the last dimension. A row of up to 8192 elements is read once and stays in registers; a longer one is
read twice, first for its maximum and sum in one pass (Milakov and Gimelshein 2018, arXiv 1805.02867).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device
from .rows import block_of, leading, row_offset, walkable
from .tiles import to


@triton.jit
def _scores(x, bias, mask, bias_step, mask_step, columns, N, last, scale, CAUSAL: tl.constexpr):
    inside = columns < N
    s = tl.load(x + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
    if bias is not None:
        s += tl.load(bias + columns * bias_step, mask=inside, other=0.0).to(tl.float32)
    if mask is not None:
        s = tl.where(tl.load(mask + columns * mask_step, mask=inside, other=0) != 0, s, float("-inf"))
    if CAUSAL:
        inside = inside & (columns <= last)
    return tl.where(inside, s, float("-inf"))  # with a negative scale what lies beyond is not -inf yet


@triton.jit(do_not_specialize=["N"])
def softmax_rows(
    x, bias, mask, out, shape, x_strides, bias_strides, mask_strides, bias_step, mask_step, N, scale,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, CAUSAL: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """out [rows, N] contiguous. shape: the leading dims of x; WHOLE: one block holds a row."""
    row = tl.program_id(0).to(tl.int64)
    x += row_offset(row, shape, x_strides)
    if bias is not None:
        bias += row_offset(row, shape, bias_strides)
    if mask is not None:
        mask += row_offset(row, shape, mask_strides)
    rows = shape[len(shape) - 1]
    last = row % rows + N - rows  # of the columns that causal lets the row see
    out += row * N
    step = tl.arange(0, BLOCK)
    if WHOLE:
        s = _scores(x, bias, mask, bias_step, mask_step, step, N, last, scale, CAUSAL)
        row_max = tl.max(s, 0)
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        e = tl.exp(s - shift)
        row_sum = tl.sum(e, 0)
        row_sum = tl.where(row_sum == 0, 1.0, row_sum)
        y = s - shift - tl.log(row_sum) if LOG else e / row_sum
        tl.store(out + step, to(y, out.dtype.element_ty), mask=step < N)
    else:
        maxima = tl.full([BLOCK], float("-inf"), tl.float32)
        lane_sums = tl.zeros([BLOCK], tl.float32)
        for first in range(0, N, BLOCK):
            s = _scores(x, bias, mask, bias_step, mask_step, first + step, N, last, scale, CAUSAL)
            new = tl.maximum(maxima, s)
            shift = tl.where(new == float("-inf"), 0.0, new)
            lane_sums = lane_sums * tl.exp(maxima - shift) + tl.exp(s - shift)
            maxima = new
        row_max = tl.max(maxima, 0)
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        row_sum = tl.sum(lane_sums * tl.exp(maxima - shift), 0)
        row_sum = tl.where(row_sum == 0, 1.0, row_sum)
        for first in range(0, N, BLOCK):
            s = _scores(x, bias, mask, bias_step, mask_step, first + step, N, last, scale, CAUSAL)
            y = s - shift - tl.log(row_sum) if LOG else tl.exp(s - shift) / row_sum
            tl.store(out + first + step, to(y, out.dtype.element_ty), mask=first + step < N)


@triton.jit(do_not_specialize=["N"])
def softmax_backward_rows(dout, out, dx, N, scale, BLOCK: tl.constexpr, LOG: tl.constexpr):
    """All [rows, N] contiguous. dx = scale * out * (dout - sum(out * dout)), or dout - exp(out) * sum(dout) with LOG."""
    row = tl.program_id(0).to(tl.int64)
    dout += row * N
    out += row * N
    dx += row * N
    step = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        g = tl.load(dout + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        if not LOG:
            g *= tl.load(out + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        sums += g
    row_sum = tl.sum(sums, 0)
    for first in range(0, N, BLOCK):
        g = tl.load(dout + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        y = tl.load(out + first + step, mask=first + step < N, other=0.0).to(tl.float32)
        d = g - tl.exp(y) * row_sum if LOG else y * (g - row_sum) * scale
        tl.store(dx + first + step, to(d, dx.dtype.element_ty), mask=first + step < N)


@on_device
def softmax(
    x: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, causal: bool, log: bool = False
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x, N = walkable(x), x.shape[-1]
    if x.shape[-1] > 1 and x.stride(-1) == 0:
        x = x.contiguous()
    bias, mask = (None if t is None else walkable(t).expand(x.shape) for t in (bias, mask))
    shape, strides = leading(x)
    others = [((), 0) if t is None else (leading(t)[1], t.stride(-1)) for t in (bias, mask)]
    block, warps = block_of(N)
    softmax_rows[(x.numel() // N,)](
        x, bias, mask, out, shape, strides, others[0][0], others[1][0], others[0][1], others[1][1], N, float(scale),
        BLOCK=block, WHOLE=block >= N, CAUSAL=causal, LOG=log, num_warps=warps,
    )  # fmt: skip
    return out


def log_softmax(x: Tensor) -> Tensor:
    return softmax(x, None, None, 1.0, False, True)


@on_device
def softmax_backward(dout: Tensor, out: Tensor, scale: float, log: bool, wide: bool) -> Tensor:
    dout, out = dout.contiguous(), out.contiguous()
    dx = torch.empty(out.shape, dtype=torch.float32 if wide else out.dtype, device=out.device)
    if out.numel() > 0:
        N = out.shape[-1]
        block, warps = block_of(N)
        softmax_backward_rows[(out.numel() // N,)](
            dout, out, dx, N, float(scale), BLOCK=block, LOG=log, num_warps=warps
        )
    return dx
