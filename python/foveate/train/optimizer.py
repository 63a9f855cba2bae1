"""AdamW with the usual parameter groups."""

from __future__ import annotations

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """With and without decay, which is for matrices that multiply activations: not for biases, norms, embeddings and tied heads."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with_decay: list[nn.Parameter] = []
    without: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (with_decay if p.dim() >= 2 and id(p) not in embeddings else without).append(p)
    groups = ((with_decay, weight_decay), (without, 0.0))
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def adamw(
    model: nn.Module, *, learning_rate: float, weight_decay: float, betas: tuple[float, float], eps: float
) -> torch.optim.AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2017, arXiv 1711.05101), torch's fused kernel, on CPU and GPU."""
    groups = parameter_groups(model, weight_decay)
    if not groups:
        raise ValueError("no weight of the model receives gradients; there is nothing to train")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
