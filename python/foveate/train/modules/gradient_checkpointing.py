"""Gradient checkpointing: each layer keeps its input only and runs again in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from foveate.models.recompute import kept
from foveate.models.registry import LAYERS


def checkpoint_layers(model: nn.Module) -> None:
    """Gradients are the same bit for bit, dropout included; one more forward pass is the price."""
    for module in model.modules():
        if isinstance(module, LAYERS):
            layer: Any = module  # an instance's forward hides that of the class, and names in the state dict stay
            layer.forward = functools.partial(checkpoint, kept()(layer.forward), use_reentrant=False)
