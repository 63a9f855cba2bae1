"""What losses take from a model's head: its matrix, never the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.ops.cross_entropy import linear_cross_entropy
from foveate.train.config import TrainConfig
from foveate.train.data.batch import IGNORED, Batch
from foveate.train.modules.lora import LoraLinear


def operands(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden, weight and bias with hidden @ weight.T + bias = head(hidden); under LoRA hidden and weight are wider."""
    if isinstance(head, LoraLinear):
        hidden, weight = head.widened(hidden)
        base: Any = head.base
        return hidden, weight, base.bias
    return hidden, head.weight, head.bias


def scaled(model: Any, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """hidden and the options of linear_cross_entropy that give the logits of a causal model, which may scale or cap them."""
    scale = getattr(model.config, "logit_scale", None)
    return hidden if scale is None else hidden * scale, {"softcap": getattr(model.config, "final_softcap", None)}


def head_loss(head: Any, hidden: Tensor, labels: Tensor, config: TrainConfig, **options: Any) -> Tensor:
    """The summed cross-entropy of head(hidden); the logits are never stored. Evaluation measures it without smoothing and z-loss."""
    if torch.is_grad_enabled():
        options |= {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}
    hidden, weight, bias = operands(head, hidden)
    options.setdefault("bias", bias)
    return linear_cross_entropy(hidden, weight, labels, reduction="sum", **options)


def token_log_probs(model: Any, hidden: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """fp32, of labels' shape: log_softmax(logits / temperature) at each label, 0 where there is none. Nothing of [tokens, vocab] is kept.

    ValueError for a temperature other than 1 where the model caps its logits or its head has a bias.
    """
    hidden, options = scaled(model, hidden)
    hidden, weight, bias = operands(model.lm_head, hidden)
    if temperature != 1:
        if options["softcap"] is not None or bias is not None:
            raise ValueError(
                f"temperature={temperature} cannot be applied to a model that caps its logits or whose head has a bias; leave it at 1"
            )
        hidden = hidden / temperature
    return -linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="none", **options)


def sequence_sums(values: Tensor, batch: Batch, side: str = "tokens") -> Tensor:
    """[sequences]: sums over each sequence of a side of the batch, of values [1, total] if packed, else [B, S]."""
    packed = batch.packed.get(side)
    if packed is None:
        return values.sum(1)
    return torch.segment_reduce(values[0], "sum", lengths=packed.cu_seqlens.diff().long())[:-1]  # not of the filling


def log_probs(model: Any, batch: Batch, side: str = "tokens", labels: str = "labels") -> Tensor:
    """[sequences]: the sum of the log-probabilities of each sequence's labels."""
    hidden = model.hidden(batch[side], packed=batch.packed.get(side))
    return sequence_sums(token_log_probs(model, hidden, batch[labels]), batch, side)


def label_counts(batch: Batch, side: str = "tokens", labels: str = "labels") -> Tensor:
    """fp32 [sequences]: how many labels each has, 1 at least."""
    return sequence_sums((batch[labels] != IGNORED).float(), batch, side).clamp(min=1)
