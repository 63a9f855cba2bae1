"""flash_attn.ops.layer_norm, on every device."""

from __future__ import annotations

import functools

from torch import Tensor

from foveate.integrations.flash_attn.ops import _add_norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + epsilon) * weight + bias over the last dimension, in x's dtype."""
    return _add_norm.norm(x, weight, bias, epsilon, False, False, x.dtype)


dropout_add_layer_norm = functools.partial(_add_norm.dropout_add_norm, rms=False)
dropout_add_layer_norm_subset = functools.partial(_add_norm.dropout_add_norm_subset, rms=False)
dropout_add_layer_norm_parallel_residual = functools.partial(_add_norm.parallel_residual, rms=False)


class DropoutAddLayerNorm(_add_norm.DropoutAddNorm):
    """`dropout_add_layer_norm` with a weight and a bias [hidden_size]."""

    rms = False
