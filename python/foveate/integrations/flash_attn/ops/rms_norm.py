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
    total, mask, _ = _add_norm.summed(x0, None, residual, rowscale, layerscale, dropout_p, residual_in_fp32)
    results = [_add_norm.norm(total, weight, bias, epsilon, True, False, x0.dtype)]
    if prenorm:
        results.append(total)
    if return_dropout_mask:
        results.append(torch.ones_like(x0, dtype=torch.bool) if mask is None else mask)
    return results[0] if len(results) == 1 else tuple(results)


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


class DropoutAddRMSNorm(torch.nn.Module):
    """`dropout_add_rms_norm` with a weight [hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm, self.p, self.eps, self.residual_in_fp32 = prenorm, p, eps, residual_in_fp32
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        return dropout_add_rms_norm(
            x0, residual, self.weight, None, self.p if self.training else 0.0, self.eps,
            prenorm=self.prenorm, residual_in_fp32=self.residual_in_fp32,
        )  # fmt: skip
