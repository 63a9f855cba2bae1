"""flash_attn.losses.cross_entropy, on every device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.integrations.flash_attn.ops.triton.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(torch.nn.Module):
    """logits [rows, V], labels [rows] -> loss, or (loss, z_loss) with return_z_loss. Options: `cross_entropy_loss`.

    reduction: "mean" over the rows whose label is not ignore_index, "sum", or "none".
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise NotImplementedError(f"reduction={reduction!r} must be 'mean', 'sum' or 'none'")
        self.ignore_index, self.reduction, self.return_z_loss = ignore_index, reduction, return_z_loss
        self.options = {
            "label_smoothing": label_smoothing,
            "logit_scale": logit_scale,
            "lse_square_scale": lse_square_scale,
            "ignore_index": ignore_index,
            "inplace_backward": inplace_backward,
            "process_group": process_group,
        }

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, z_loss = (
            self._reduced(x, target) for x in cross_entropy_loss(input, target, precomputed_lse, **self.options)
        )
        return (loss, z_loss) if self.return_z_loss else loss

    def _reduced(self, rows: Tensor, target: Tensor) -> Tensor:
        if self.reduction == "none":
            return rows
        return rows.sum() if self.reduction == "sum" else rows.sum() / (target != self.ignore_index).sum()
