"""swiglu and geglu: elementwise over rows, each program one block of one row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import on_device
from .rows import block_of
from .tiles import to


@triton.jit
def _activation(g, GELU: tl.constexpr):
    """g * sigmoid(h) and its derivative; e = exp(-|h|) does not overflow."""
    h = g
    dh = 1.0
    if GELU:
        c = tl.where(g > 40.0, 40.0, tl.where(g < -40.0, -40.0, g))  # there the sigmoid is 0 or 1; NaN stays
        h = 1.5957691216057308 * c * (1 + 0.044715 * c * c)
        dh = 1.5957691216057308 * (1 + 3 * 0.044715 * c * c)
    e = tl.exp(-tl.abs(h))
    r = 1 / (1 + e)
    s = tl.where(h < 0, e * r, r)
    rest = tl.where(h < 0, r, e * r)
    value = g * s
    return value, s + value * rest * dh


@triton.jit(do_not_specialize=["N"])
def glu_rows(gate, up, out, gate_stride, up_stride, N, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activation(g, GELU)
    tl.store(out + row * N + columns, to(value * u, out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def glu_drows(dout, gate, up, dgate, dup, gate_stride, up_stride, N, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    d = tl.load(dout + row * N + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation(g, GELU)
    tl.store(dgate + row * N + columns, to(d * u * slope, dgate.dtype.element_ty), mask=inside)
    tl.store(dup + row * N + columns, to(d * value, dup.dtype.element_ty), mask=inside)


@on_device
def glu(gate: Tensor, up: Tensor, out: Tensor, gelu: bool) -> None:
    """[rows, N] each; gate and up with a last dim of stride 1, out contiguous."""
    rows, N = gate.shape
    if rows > 0 and N > 0:
        block = min(block_of(N)[0], 1024)
        glu_rows[(rows, -(-N // block))](gate, up, out, gate.stride(0), up.stride(0), N, GELU=gelu, BLOCK=block)


@on_device
def glu_backward(dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, gelu: bool) -> None:
    rows, N = gate.shape
    if rows > 0 and N > 0:
        block = min(block_of(N)[0], 1024)
        glu_drows[(rows, -(-N // block))](
            dout, gate, up, dgate, dup, gate.stride(0), up.stride(0), N, GELU=gelu, BLOCK=block
        )
