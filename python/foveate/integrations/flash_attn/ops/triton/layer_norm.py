"""flash_attn.ops.triton.layer_norm: layer_norm_fn, rms_norm_fn and RMSNorm, on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate
from foveate.integrations.flash_attn.ops import _add_norm


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """norm(dropout(x * rowscale) + dropout(x1) + residual) * weight + bias, over the last dimension, in x's dtype or out_dtype.

    Returns y; with weight1 also y1, of weight1 and bias1; with prenorm also the sum, in the residual's dtype (fp32 with
    residual_in_fp32 where there is no residual); with return_dropout_mask also the masks of x and x1 (None without dropout).
    """
    if out is not None or residual_out is not None:
        raise foveate.UnsupportedError(
            "out and residual_out: results go to tensors of their own; copy them where you need them"
        )
    if x1 is not None and rowscale is not None:
        raise ValueError("rowscale and x1 exclude each other, as in flash_attn")
    total, *masks = _add_norm.summed(x, x1, residual, rowscale, None, dropout_p, residual_in_fp32)
    tail = (eps, is_rms_norm, zero_centered_weight, out_dtype or x.dtype)
    results: list[Tensor | None] = [_add_norm.norm(total, weight, bias, *tail)]
    if weight1 is not None:
        results.append(_add_norm.norm(total, weight1, bias1, *tail))
    if prenorm:
        results.append(total)
    if return_dropout_mask:
        results += masks
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """`layer_norm_fn` with x / sqrt(mean(x**2) + eps) as the norm."""
    return layer_norm_fn(
        x, weight, bias, residual, x1, weight1, bias1, eps, dropout_p, rowscale, prenorm, residual_in_fp32,
        zero_centered_weight, True, return_dropout_mask, out_dtype, out, residual_out,
    )  # fmt: skip


class RMSNorm(torch.nn.Module):
    """`rms_norm_fn` with a weight [hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.dropout_p, self.zero_centered_weight = eps, dropout_p, zero_centered_weight
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        return rms_norm_fn(
            x, self.weight, None, residual, eps=self.eps, dropout_p=self.dropout_p if self.training else 0.0,
            prenorm=prenorm, residual_in_fp32=residual_in_fp32, zero_centered_weight=self.zero_centered_weight,
        )  # fmt: skip
