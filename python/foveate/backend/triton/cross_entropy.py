"""cross_entropy of rows of logits: the loss and what its gradient needs in one pass over a row, the gradient in another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import on_device
from .rows import block_of
from .scores import tanh
from .tiles import to


@triton.jit
def _capped(logits, columns, V, softcap):
    x = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    if softcap is not None:
        x = tl.where(columns < V, softcap * tanh(x / softcap), float("-inf"))
    return x


@triton.jit(do_not_specialize=["V", "ignore_index"])
def cross_entropy_rows(
    logits, target, loss, stats, stride, V, ignore_index, smoothing, z_loss, softcap, BLOCK: tl.constexpr
):
    """loss fp32 [rows], stats fp32 [rows, 2]: the maximum and the log of the sum of exp(x - maximum)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    label = tl.load(target + row)
    if label == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(stats + 2 * row + tl.arange(0, 2), tl.zeros([2], tl.float32))
        return
    step = tl.arange(0, BLOCK)
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_sums = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    hit = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        columns = first + step
        x = _capped(logits, columns, V, softcap)
        new = tl.maximum(maxima, x)
        shift = tl.where(new == float("-inf"), 0.0, new)
        lane_sums = lane_sums * tl.exp(maxima - shift) + tl.exp(x - shift)
        maxima = new
        sums += tl.where(columns < V, x, 0.0)
        hit += tl.where(columns == label, x, 0.0)
    row_max = tl.max(maxima, 0)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    log_sum = tl.log(tl.sum(lane_sums * tl.exp(maxima - shift), 0))
    lse = shift + log_sum
    value = lse - (1 - smoothing) * tl.sum(hit, 0) + z_loss * lse * lse
    if smoothing > 0:  # 0 * -inf would be NaN
        value -= smoothing * (tl.sum(sums, 0) / V)
    outside = (label < 0) | (label >= V)
    tl.store(loss + row, tl.where(outside, float("nan"), value))
    tl.store(stats + 2 * row, shift)
    tl.store(stats + 2 * row + 1, tl.where(outside, float("nan"), log_sum))


@triton.jit(do_not_specialize=["V", "ignore_index"])
def cross_entropy_drows(
    dloss, logits, target, stats, dlogits, stride, d_stride, V, ignore_index, smoothing, z_loss, softcap, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    dlogits += row * d_stride
    label = tl.load(target + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(dlogits + columns, tl.zeros([BLOCK], tl.float32).to(dlogits.dtype.element_ty), mask=columns < V)
        return
    row_max, log_sum = tl.load(stats + 2 * row), tl.load(stats + 2 * row + 1)
    x = _capped(logits, columns, V, softcap)
    p = tl.exp(x - row_max - log_sum)
    d = p * (1 + 2 * z_loss * (row_max + log_sum)) - smoothing / V - tl.where(columns == label, 1 - smoothing, 0.0)
    if softcap is not None:
        t = tl.where(columns < V, x, 0.0) / softcap
        d *= 1 - t * t
    d *= tl.load(dloss + row)
    tl.store(dlogits + columns, to(d, dlogits.dtype.element_ty), mask=columns < V)


def _check_target(target: Tensor, V: int, ignore_index: int) -> None:
    """On the CPU, under the interpreter. On a GPU the check would wait for the device: there the loss of such a row is NaN."""
    if target.is_cpu:
        outside = ((target < 0) | (target >= V)) & (target != ignore_index)
        if outside.any():
            i = int(outside.nonzero()[0])
            raise ValueError(
                f"target[{i}] = {int(target[i])} is outside 0..{V - 1} and is not ignore_index = {ignore_index}"
            )


@on_device
def cross_entropy(logits: Tensor, target: Tensor, loss: Tensor, stats: Tensor, ignore_index: int, smoothing: float, z_loss: float,
                  softcap: float) -> None:  # fmt: skip
    """logits [rows, V] with a last dim of stride 1; target, loss [rows] and stats [rows, 2] contiguous."""
    rows, V = logits.shape
    _check_target(target, V, ignore_index)
    if rows > 0:
        block, warps = block_of(V)
        cross_entropy_rows[(rows,)](
            logits, target, loss, stats, logits.stride(0), V, ignore_index, float(smoothing), float(z_loss),
            float(softcap) if softcap > 0 else None, BLOCK=min(block, 4096), num_warps=warps,
        )  # fmt: skip


@on_device
def cross_entropy_backward(dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, dlogits: Tensor, ignore_index: int,
                           smoothing: float, z_loss: float, softcap: float) -> None:  # fmt: skip
    rows, V = logits.shape
    if rows > 0:
        block = min(block_of(V)[0], 4096)
        cross_entropy_drows[(rows, -(-V // block))](
            dloss, logits, target, stats, dlogits, logits.stride(0), dlogits.stride(0), V, ignore_index, float(smoothing),
            float(z_loss), float(softcap) if softcap > 0 else None, BLOCK=block,
        )  # fmt: skip
