"""AdamW with the usual parameter groups."""

from __future__ import annotations

import torch
from torch import nn


def decays(module: nn.Module, name: str, p: nn.Parameter) -> bool:
    """Weight decay is for matrices that multiply activations: not for biases, norms and embeddings."""
    return p.dim() >= 2 and not isinstance(module, nn.Embedding)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups, with and without decay. A tied head is the embedding, so it does not decay either."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with_decay, without = [], []
    seen: set[int] = set()
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in seen or not p.requires_grad:
                continue
            seen.add(id(p))
            (with_decay if id(p) not in embeddings and decays(module, name, p) else without).append(p)
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
