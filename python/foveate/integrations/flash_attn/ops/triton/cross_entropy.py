"""flash_attn.ops.triton.cross_entropy, on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import foveate


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """(losses [rows], z_losses [rows]) in fp32: the loss with lse_square_scale * lse**2 in it, and that part alone, without gradient.

    logits [rows, V], multiplied by logit_scale (1.0, or a copy in fp32 is made); labels [rows]; rows with ignore_index give 0.
    precomputed_lse saves nothing here, and inplace_backward neither: the gradient is a tensor of its own. Logits that are spread over a
    process_group are refused.
    """
    if process_group is not None and torch.distributed.get_world_size(process_group) > 1:
        raise foveate.UnsupportedError(
            "process_group: logits whose vocabulary is spread over processes are not served; gather them, or pass process_group=None"
        )
    x = logits if logit_scale == 1.0 else logits.float() * logit_scale
    losses = foveate.cross_entropy(
        x, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=lse_square_scale, reduction="none"
    )
    with torch.no_grad():
        if not lse_square_scale:
            return losses, torch.zeros_like(losses)
        lse = torch.logsumexp(x.float(), -1) if precomputed_lse is None else precomputed_lse
        z_losses = torch.where(labels == ignore_index, 0.0, lse_square_scale * lse.square())
    return losses, z_losses
