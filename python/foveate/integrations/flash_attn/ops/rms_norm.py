"""flash_attn.ops.rms_norm, on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.integrations.flash_attn.ops import _add_norm


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x**2) + epsilon) * weight over the last dimension."""
    return foveate.rms_norm(x, weight, epsilon)


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """rms_norm(dropout(x0 * rowscale * layerscale) + residual); with prenorm also that sum, with return_dropout_mask also the mask.

    The sum has the residual's dtype, or fp32 with residual_in_fp32 where there is none.
    """
    return _add_norm.dropout_add_norm(
        x0, None, residual, [(weight, bias)], epsilon, dropout_p, rms=True, rowscale=rowscale, layerscale=layerscale,
        prenorm=prenorm, residual_in_fp32=residual_in_fp32, return_dropout_mask=return_dropout_mask,
    )  # fmt: skip


def dropout_add_rms_norm_parallel_residual(
    x0: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    weight0: Tensor,
    bias0: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    epsilon: float,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """(y0, y1): two rms_norms of dropout(x0) + dropout(x1) + residual, y1 None without weight1; with prenorm also the sum, with
    return_dropout_mask also the masks of x0 and x1."""
    return _add_norm.dropout_add_norm(
        x0, x1, residual, [(weight0, bias0), (weight1, bias1)], epsilon, dropout_p, rms=True,
        prenorm=prenorm, residual_in_fp32=residual_in_fp32, return_dropout_mask=return_dropout_mask,
    )  # fmt: skip


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
