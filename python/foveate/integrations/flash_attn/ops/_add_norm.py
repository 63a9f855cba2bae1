"""Dropout, residual addition and a norm, in flash_attn's order: what its fused functions compute."""

from __future__ import annotations

from typing import Any

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


def _finished(
    x: Tensor,
    x1: Tensor | None,
    residual: Tensor | None,
    affine: list[tuple[Tensor | None, Tensor | None]],
    eps: float,
    dropout_p: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    rms: bool,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
) -> Any:
    """norm(summed(...)) for each (weight, bias) of affine, None for a weight None; with prenorm also the sum, with return_dropout_mask
    also the masks of x and x1."""
    total, *masks = summed(x, x1, residual, rowscale, layerscale, dropout_p, residual_in_fp32)
    results: list[Tensor | None] = [
        None if weight is None else norm(total, weight, bias, eps, rms, False, x.dtype) for weight, bias in affine
    ]
    if prenorm:
        results.append(total)
    if return_dropout_mask:
        for dropped, mask in zip((x,) if len(affine) == 1 else (x, x1), masks):
            everything = None if dropped is None else torch.ones_like(dropped, dtype=torch.bool)
            results.append(everything if mask is None else mask)
    return results[0] if len(results) == 1 else tuple(results)


def dropout_add_norm(
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
    *,
    rms: bool,
) -> Any:
    """norm(dropout(x0 * rowscale * layerscale) + residual); with prenorm also that sum, with return_dropout_mask also the mask.

    The sum has the residual's dtype, or fp32 with residual_in_fp32 where there is none.
    """
    tail = (rowscale, layerscale, rms, prenorm, residual_in_fp32, return_dropout_mask)
    return _finished(x0, None, residual, [(weight, bias)], epsilon, dropout_p, *tail)


def dropout_add_norm_subset(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    layerscale: Tensor | None = None,
    x0_subset: Tensor | None = None,
    out_subset: Tensor | None = None,
    rowscale_const: float = 1.0,
    out_numrows: int = 0,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    *,
    rms: bool,
) -> Any:
    """`dropout_add_norm` of some rows: x0 has those for which x0_subset [...] is not 0, which says their places in x0 from 1 on; the others
    add nothing. The norm comes out of the rows for which out_subset is not 0 alone, [out_numrows, N]; the sum has all rows."""
    x, mask, _ = summed(x0 * rowscale_const, None, None, None, layerscale, dropout_p, False)
    if x0_subset is not None:
        places = x0_subset.long()
        rows = x.reshape(-1, x.shape[-1])[(places - 1).clamp(min=0)]
        x = torch.where(places[..., None] > 0, rows, 0.0)
    total, _, _ = summed(x, None, residual, None, None, 0.0, residual_in_fp32)
    chosen = total if out_subset is None else total.reshape(-1, total.shape[-1])[out_subset.flatten() > 0]
    results = [norm(chosen, weight, bias, epsilon, rms, False, x0.dtype)]
    if prenorm:
        results.append(total)
    if return_dropout_mask:
        results.append(torch.ones_like(x0, dtype=torch.bool) if mask is None else mask)
    return results[0] if len(results) == 1 else tuple(results)


def parallel_residual(
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
    *,
    rms: bool,
) -> Any:
    """(y0, y1): two norms of dropout(x0) + dropout(x1) + residual, y1 None without weight1; with prenorm also the sum, with
    return_dropout_mask also the masks of x0 and x1."""
    tail = (None, None, rms, prenorm, residual_in_fp32, return_dropout_mask)
    return _finished(x0, x1, residual, [(weight0, bias0), (weight1, bias1)], epsilon, dropout_p, *tail)


class DropoutAddNorm(torch.nn.Module):
    """`dropout_add_norm` with a weight [hidden_size], and a bias unless rms."""

    rms: bool
    bias: torch.nn.Parameter | None

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
        zeros = None if self.rms else torch.nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", zeros)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        return dropout_add_norm(
            x0, residual, self.weight, self.bias, self.p if self.training else 0.0, self.eps, rms=self.rms,
            prenorm=self.prenorm, residual_in_fp32=self.residual_in_fp32,
        )  # fmt: skip
