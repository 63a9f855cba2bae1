"""Weights of a model that is trained from scratch."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from foveate.models.layers import RMSNorm
from foveate.models.t5 import T5

_STD = 0.02
# What adds to the residual stream, whose variance would grow with the number of layers.
_RESIDUAL = re.compile(r".*\.(o_proj|down_proj|c_proj)\.weight")


@torch.no_grad()
def draw_weights(model: nn.Module, seed: int) -> None:
    """N(0, 0.02) for matrices and embeddings, divided by sqrt(2 * layers) where a block ends (GPT-2), norms 1, biases 0.

    T5 scales by its own rules, as its attention has no factor D**-0.5 (Raffel et al. 2020, in the authors' code).
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    for path, module in model.named_modules():
        for leaf, p in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}"
            if isinstance(module, (RMSNorm, nn.LayerNorm)):
                offset: Any = getattr(module, "offset", 0.0)  # Gemma's norms multiply by 1 + weight
                p.fill_(0.0 if leaf == "bias" else 1.0 - offset)
            elif p.dim() < 2 or not p.requires_grad:  # a constant
                p.zero_()
            else:
                std = _t5_std(model, name) if isinstance(model, T5) else _STD
                if _RESIDUAL.fullmatch(name):
                    std /= (2 * config.num_layers) ** 0.5
                p.copy_(torch.randn(p.shape, generator=generator) * std)


def _t5_std(model: T5, name: str) -> float:
    c = model.config
    if name.endswith("shared.weight"):
        return 1.0
    if name.endswith("Attention.q.weight"):
        return (c.hidden_size * c.head_dim) ** -0.5
    if name.endswith("Attention.o.weight"):
        return (c.num_heads * c.head_dim) ** -0.5
    if name.endswith("wo.weight"):
        return c.intermediate_size**-0.5
    return c.hidden_size**-0.5
