"""The product with packed weights (`foveate.quantization.panels` has their layout): int8 activations against blocks, or floats.

A program takes one panel, 32 output features, and a share of the input features. Few rows: the shares are programs of their own, so that
one token fills the chip, and a second kernel adds them up. Many rows: one program takes share after share. Both add in one order, and
products of a block are integers, so that a row has the same bits whatever the number of rows.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.backend.devices import num_sms
from foveate.quantization.gguf_blocks import FORMATS
from foveate.quantization.panels import PANEL, block_bytes

from . import on_device
from .tiles import ROUND, dot, to

_F32, _BF16, _Q8_0, _Q4_0, _Q4_1 = (tl.constexpr(i) for i in range(5))
_CODES = {"f32": 0, "bf16": 1, "q8_0": 2, "q4_0": 3, "q4_1": 4}
_STEP: tl.constexpr = tl.constexpr(32)  # input features that are taken at a time: a block
_FEW_ROWS = 16
_MAX_SHARES = 16


@functools.lru_cache(maxsize=4096)
def shares(in_features: int, out_features: int, num_sms: int) -> int:
    """Parts of the input features: eight programs for each SM, at least 128 features each. The rows have no say."""
    wanted = -(-8 * num_sms // -(-out_features // PANEL))
    return max(1, min(wanted, in_features // 128, _MAX_SHARES))


@triton.jit(do_not_specialize=["steps"])
def quantize_rows(x, q, dx, sums, x_stride, steps, BLOCKS: tl.constexpr):
    """q int8 [rows, steps * 32], dx and sums fp32 [rows, steps]: x ~ dx * q, and a block's sum of q. dx is NaN where x is not finite."""
    row = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = b < steps
    columns = b[:, None] * _STEP + tl.arange(0, _STEP)[None, :]
    values = tl.load(x + row * x_stride + columns, mask=inside[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    some = largest > 2.0**-100
    inverse = tl.where(some, tl.div_rn(127.0, tl.where(some, largest, 1.0)), 0.0)
    scaled = values * inverse[:, None]
    rounded = (scaled + ROUND) - ROUND
    rounded = tl.where(tl.abs(rounded) <= 127.0, rounded, 0.0)
    tl.store(q + row * steps * _STEP + columns, rounded.to(tl.int8), mask=inside[:, None])
    tl.store(dx + row * steps + b, tl.div_rn(largest, 127.0) + tl.sum(values * 0, 1), mask=inside)
    tl.store(sums + row * steps + b, tl.sum(rounded, 1), mask=inside)


@triton.jit
def _quants(data, block, FORMAT: tl.constexpr):
    """int8 [32 input features, 32 output features] of the blocks at byte `block`."""
    k = tl.arange(0, _STEP if FORMAT == _Q8_0 else 16)[:, None]
    n = tl.arange(0, 32)[None, :]
    stored = tl.load(data + block + (k // 4 * 128 + n * 4 + k % 4))
    if FORMAT == _Q8_0:
        return stored ^ -128
    else:
        pair = tl.join(stored & 15, (stored >> 4) & 15)  # elements k and k + 16
        q = tl.reshape(tl.permute(pair, (2, 0, 1)), [_STEP, 32])
        return q - 8 if FORMAT == _Q4_0 else q


@triton.jit
def _add_blocks(acc, q, dx, sums, data, headers, row, valid, panel, step, steps, FORMAT: tl.constexpr, BYTES: tl.constexpr,
                HEADERS: tl.constexpr):  # fmt: skip
    """acc + the products of one block of 32 input features."""
    block = (panel * steps + step) * BYTES
    header = headers + (block + (BYTES - 64 * HEADERS)) // 2 + tl.arange(0, 32)
    x = tl.load(q + (row * steps + step)[:, None] * _STEP + tl.arange(0, _STEP)[None, :], mask=valid[:, None], other=0)
    products = tl.dot(x, _quants(data, block, FORMAT), out_dtype=tl.int32).to(tl.float32)
    scale = tl.load(dx + row * steps + step, mask=valid, other=0.0)
    acc = tl.fma(products, scale[:, None] * tl.load(header).to(tl.float32)[None, :], acc)
    if FORMAT == _Q4_1:
        x_sum = tl.load(sums + row * steps + step, mask=valid, other=0.0)
        acc = tl.fma((scale * x_sum)[:, None], tl.load(header + 32).to(tl.float32)[None, :], acc)
    return acc


@triton.jit
def _add_floats(acc, x, x_stride, data, row, valid, panel, step, K, FORMAT: tl.constexpr):
    """acc + the products of 32 input features; data: fp32 or bf16."""
    k = step * _STEP + tl.arange(0, _STEP)
    n = tl.arange(0, 32)[None, :]
    inside = k < K
    a = tl.load(x + row[:, None] * x_stride + k[None, :], mask=valid[:, None] & inside[None, :], other=0.0).to(
        tl.float32
    )
    if FORMAT == _BF16:
        pointers = panel * ((K + 1) // 2) * 64 + (k // 2 * 64 + k % 2)[:, None] + n * 2
    else:
        pointers = panel * K * 32 + k[:, None] * 32 + n
    b = tl.load(data + pointers, mask=inside[:, None], other=0.0)
    return dot(to(a, data.dtype.element_ty), b, acc)


@triton.jit(do_not_specialize=["rows", "K", "OUT", "panels", "splits", "share"])
def packed_product(
    x, q, dx, sums, data, headers, bias, out, parts, x_stride, out_stride, rows, K, OUT, panels, splits, share,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, HEADERS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out [rows, OUT], or with parts fp32 [splits, rows, OUT] the sums over the share of one split. K: input features."""
    panel = (tl.program_id(0) % panels).to(tl.int64)
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    valid = row < rows
    steps = tl.cdiv(K, _STEP)
    first_split = 0
    end_split = splits
    if parts is not None:
        first_split = tl.program_id(0) // panels
        end_split = first_split + 1
    y = tl.zeros([BLOCK_M, 32], tl.float32)
    for split in range(first_split, end_split):
        acc = tl.zeros([BLOCK_M, 32], tl.float32)
        for step in range(split * share, tl.minimum(split * share + share, steps)):
            if FORMAT >= _Q8_0:
                acc = _add_blocks(
                    acc, q, dx, sums, data, headers, row, valid, panel, step, steps, FORMAT, BYTES, HEADERS
                )
            else:
                acc = _add_floats(acc, x, x_stride, data, row, valid, panel, step, K, FORMAT)
        y += acc
    n = panel * 32 + tl.arange(0, 32)
    mask = valid[:, None] & (n < OUT)[None, :]
    if parts is not None:
        tl.store(parts + (first_split * rows + row)[:, None] * OUT + n[None, :], y, mask=mask)
    else:
        if bias is not None:
            y += tl.load(bias + n, mask=n < OUT, other=0.0)[None, :]
        tl.store(out + row[:, None] * out_stride + n[None, :], to(y, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "OUT", "splits"])
def add_shares(parts, bias, out, out_stride, rows, OUT, splits, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        y += tl.load(parts + (split * rows + row) * OUT + n, mask=n < OUT, other=0.0)
    if bias is not None:
        y += tl.load(bias + n, mask=n < OUT, other=0.0)
    tl.store(out + row * out_stride + n, to(y, out.dtype.element_ty), mask=n < OUT)


@triton.jit(do_not_specialize=["K", "OUT"])
def packed_rows(
    ids,
    data,
    headers,
    out,
    K,
    OUT,
    FORMAT: tl.constexpr,
    BYTES: tl.constexpr,
    HEADERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out fp32 [ids, K]: rows of the weight. An id outside of 0..OUT - 1, which nobody checked on a GPU, is cut off there."""
    target = out + tl.program_id(0).to(tl.int64) * K
    id = tl.minimum(tl.maximum(tl.load(ids + tl.program_id(0)).to(tl.int64), 0), OUT - 1)
    panel, lane = id // 32, id % 32
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < K
    if FORMAT == _F32:
        w = tl.load(data + panel * K * 32 + k * 32 + lane, mask=inside)
    elif FORMAT == _BF16:
        w = tl.load(data + panel * ((K + 1) // 2) * 64 + k // 2 * 64 + lane * 2 + k % 2, mask=inside).to(tl.float32)
    else:
        block, c = (panel * (K // _STEP) + k // _STEP) * BYTES, k % _STEP
        header = headers + (block + (BYTES - 64 * HEADERS)) // 2 + lane
        if FORMAT == _Q8_0:
            q = tl.load(data + block + c // 4 * 128 + lane * 4 + c % 4, mask=inside, other=0).to(tl.int32) ^ -128
        else:
            q = tl.load(data + block + c % 16 // 4 * 128 + lane * 4 + c % 4, mask=inside, other=0).to(tl.int32)
            q = (q >> (c // 16 * 4)) & 15
            if FORMAT == _Q4_0:
                q -= 8
        w = tl.load(header, mask=inside, other=0.0).to(tl.float32) * q.to(tl.float32)
        if FORMAT == _Q4_1:
            w += tl.load(header + 32, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + k, w, mask=inside)


def _views(data: Tensor, format: str) -> tuple[Tensor, Tensor | None, int, int]:
    """The data as the kernels read it, its fp16 headers, the bytes of a block of a panel, and how many headers a block has."""
    if format in FORMATS:
        return data, data.view(torch.float16), block_bytes(format), FORMATS[format].headers
    return data.view(torch.float32 if format == "f32" else torch.bfloat16), None, 0, 0


@on_device
def packed_linear(x: Tensor, data: Tensor, format: str, bias: Tensor | None, out: Tensor) -> None:
    """x [rows, K] with a last dim of stride 1; bias fp32 [OUT]; out [rows, OUT] contiguous."""
    (rows, K), OUT = x.shape, out.shape[1]
    if out.numel() == 0:
        return
    values, headers, size, count = _views(data, format)
    q = dx = sums = None
    steps = -(-K // PANEL)
    if headers is not None:
        q = torch.empty((rows, K), dtype=torch.int8, device=x.device)
        dx, sums = (torch.empty((rows, steps), dtype=torch.float32, device=x.device) for _ in range(2))
        quantize_rows[(rows, -(-steps // 16))](x, q, dx, sums, x.stride(0), steps, BLOCKS=16)
    few, panels, splits = rows <= _FEW_ROWS, -(-OUT // PANEL), shares(K, OUT, num_sms(x.device))
    parts = None
    if few and splits > 1:
        parts = torch.empty((splits, rows, OUT), dtype=torch.float32, device=x.device)
    block_m = 16 if few or headers is None else 64
    packed_product[(panels * (splits if parts is not None else 1), -(-rows // block_m))](
        x, q, dx, sums, values, headers, bias, out, parts, x.stride(0), out.stride(0), rows, K, OUT, panels, splits, -(-steps // splits),
        FORMAT=_CODES[format], BYTES=size, HEADERS=count, BLOCK_M=block_m, num_warps=2 if block_m == 16 else 4, num_stages=4,
    )  # fmt: skip
    if parts is not None:
        add_shares[(rows, -(-OUT // 1024))](parts, bias, out, out.stride(0), rows, OUT, splits, BLOCK=1024)


@on_device
def weight_rows(ids: Tensor, data: Tensor, format: str, out: Tensor, out_features: int) -> None:
    """ids [n] contiguous; out fp32 [n, K] contiguous."""
    values, headers, size, count = _views(data, format)
    if out.numel() > 0:
        packed_rows[(len(ids), -(-out.shape[1] // 1024))](
            ids, values, headers, out, out.shape[1], out_features, FORMAT=_CODES[format], BYTES=size, HEADERS=count, BLOCK=1024,
        )  # fmt: skip
