"""Tensors as the kernels read them: rows of neighbouring elements."""

from __future__ import annotations

from torch import Tensor


def contiguous_rows(x: Tensor) -> Tensor:
    """x, copied if its last dimension is not contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def matrix(x: Tensor) -> Tensor:
    """x of any shape as [rows, N] with contiguous rows; a view where the rows are evenly spaced."""
    return contiguous_rows(x.reshape(x.shape[:-1].numel(), x.shape[-1]) if x.dim() else x.reshape(1, 1))
