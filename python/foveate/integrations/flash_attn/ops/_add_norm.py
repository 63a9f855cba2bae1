"""Dropout, residual addition and a norm, in flash_attn's order: what its fused functions compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import foveate


def summed(
    x: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    dropout_p: float,
    residual_in_fp32: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dropout(x * rowscale * layerscale) + dropout(x1) + residual, with the masks of dropout (True = kept)."""
    if rowscale is not None:
        x = x * rowscale[..., None]
    if layerscale is not None:
        x = x * layerscale
    mask = mask1 = None
    if dropout_p > 0:
        x, mask = _dropped(x, dropout_p)
        if x1 is not None:
            x1, mask1 = _dropped(x1, dropout_p)
    dtype = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    total = x.to(dtype)
    for other in (x1, residual):
        total = total if other is None else total + other
    return total.to(dtype), mask, mask1


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
    mask = torch.rand(x.shape, device=x.device) >= p
    return x.masked_fill(~mask, 0.0) / (1 - p), mask


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, zero_centered: bool, dtype: torch.dtype
) -> Tensor:
    """RMSNorm, or LayerNorm, of x with weight (1 + weight if zero_centered), rounded to dtype."""
    weight = weight + 1 if zero_centered else weight
    if not rms:
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
        return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps).to(
            dtype
        )
    if weight.dtype not in (x.dtype, torch.float32):
        weight = weight.float()
    out = foveate.rms_norm(x, weight, eps)
    return (out if bias is None else out + bias).to(dtype)
