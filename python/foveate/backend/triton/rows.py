"""What the kernels over rows share: where a row lies, and how wide its blocks are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 8192  # elements of a row that one program holds at a time


@triton.jit
def row_offset(row, shape, strides):
    """Where row `row` of a tensor with these leading dims begins: int64."""
    offset = tl.zeros([], tl.int64)
    for axis in tl.static_range(len(shape) - 1, -1, -1):
        offset += (row % shape[axis]) * strides[axis]
        row = row // shape[axis]
    return offset


def leading(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of all dims but the last, one of size 1 in front so that there is always one."""
    return (1, *x.shape[:-1]), (0, *x.stride()[:-1])


def walkable(x: Tensor) -> Tensor:
    """x with a last dimension of stride 1, or of stride 0 where it broadcasts."""
    return x if x.shape[-1] <= 1 or x.stride(-1) in (0, 1) else x.contiguous()


def block_of(columns: int) -> tuple[int, int]:
    """Block width and warps for rows of `columns` elements."""
    block = min(MAX_BLOCK, max(16, triton.next_power_of_2(columns)))
    return block, 4 if block <= 2048 else 8
