"""flash_attn.ops.rms_norm, on every device."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.integrations.flash_attn.ops import _add_norm


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x**2) + epsilon) * weight over the last dimension."""
    return foveate.rms_norm(x, weight, epsilon)


dropout_add_rms_norm = functools.partial(_add_norm.dropout_add_norm, rms=True)
dropout_add_rms_norm_subset = functools.partial(_add_norm.dropout_add_norm_subset, rms=True)
dropout_add_rms_norm_parallel_residual = functools.partial(_add_norm.parallel_residual, rms=True)


class RMSNorm(torch.nn.Module):
    """`rms_norm` with a weight [hidden_size]."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class DropoutAddRMSNorm(_add_norm.DropoutAddNorm):
    """`dropout_add_rms_norm` with a weight [hidden_size]."""

    rms = True
