"""flash_attn.ops.layer_norm, on every device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.integrations.flash_attn.ops import _add_norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias over the last dimension, in x's dtype."""
    return _add_norm.norm(x, weight, bias, epsilon, False, False, x.dtype)


def dropout_add_layer_norm(
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
    """layer_norm(dropout(x0 * rowscale * layerscale) + residual); with prenorm also that sum, with return_dropout_mask also the mask.

    The sum has the residual's dtype, or fp32 with residual_in_fp32 where there is none.
    """
    return _add_norm.dropout_add_norm(
        x0, None, residual, [(weight, bias)], epsilon, dropout_p, rms=False, rowscale=rowscale, layerscale=layerscale,
        prenorm=prenorm, residual_in_fp32=residual_in_fp32, return_dropout_mask=return_dropout_mask,
    )  # fmt: skip


def dropout_add_layer_norm_parallel_residual(
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
    """(y0, y1): two layer_norms of dropout(x0) + dropout(x1) + residual, y1 None without weight1; with prenorm also the sum, with
    return_dropout_mask also the masks of x0 and x1."""
    return _add_norm.dropout_add_norm(
        x0, x1, residual, [(weight0, bias0), (weight1, bias1)], epsilon, dropout_p, rms=False,
        prenorm=prenorm, residual_in_fp32=residual_in_fp32, return_dropout_mask=return_dropout_mask,
    )  # fmt: skip


class DropoutAddLayerNorm(_add_norm.DropoutAddNorm):
    """`dropout_add_layer_norm` with a weight and a bias [hidden_size]."""

    rms = False
