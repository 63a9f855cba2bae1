"""Reward models: a number for an answer, learnt from pairs of which one is better (Bradley and Terry 1952; Ouyang et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.train.data.batch import Batch, join, layout
from foveate.train.data.examples import Example
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.labels import Classes
from foveate.train.objectives.pairs import Pairs, halves, sums_of


def bradley_terry_losses(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) of each pair."""
    return -F.logsigmoid(chosen - rejected - margin)


class RewardModel(Pairs):
    """Rows: {"prompt", "chosen", "rejected"}, and "margin", a number, by how much the chosen one is better (Touvron et al. 2023).

    The reward is the one label of `LlamaForSequenceClassification`, from the last token. With center_rewards c the loss has
    c (chosen + rejected)**2 too (Eisenstein et al. 2023, arXiv 2312.09244).
    """

    head = "sequence-classification"
    predicts = False
    classes = Classes(["reward"], [0], known=True)  # the one label of the exported config

    def margin(self, row: dict[str, Any]) -> float:
        value = row.get("margin")
        if value is None:
            return 0.0
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"the margin is {value!r:.40}; it must be a number")
        return number

    def teaches(self, store: TokenStore, document: int, read: np.ndarray) -> bool:
        both = [store.get(name, document)[:n] for name, n in zip(self.names, read)]
        return all(map(len, both)) and not np.array_equal(both[0], both[1])

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        packing = self.config.packing
        texts = [tokens for example in examples for tokens, _ in self.sequences(store, example.document)]
        lengths = [len(tokens) for tokens in texts]
        packed, tensors = layout(lengths, packing)
        tensors["tokens"] = join(texts, packing)
        margins = np.concatenate([store.get("margin", example.document) for example in examples])
        tensors["margin"] = torch.from_numpy(margins.copy())
        return Batch(tensors, packed, len(examples), sum(lengths))

    def learn(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = halves(rewards(model, batch))
        losses = bradley_terry_losses(chosen, rejected, batch["margin"])
        if self.config.center_rewards and torch.is_grad_enabled():
            losses = losses + self.config.center_rewards * (chosen + rejected) ** 2
        found = sums_of({
            "accuracy": (chosen > rejected).float(), "margin": chosen - rejected, "mean_reward": (chosen + rejected) / 2,
        })  # fmt: skip
        return losses.sum(), found

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        loss, sums = self.learn(model, batch)
        return {"loss": loss, **sums}


def rewards(model: Any, batch: Batch) -> Tensor:
    """fp32 [sequences]: the label of each sequence's last token."""
    packed = batch.packed.get("tokens")
    hidden = model.hidden(batch["tokens"], packed=packed)
    if packed is not None:
        last = hidden[0, packed.cu_seqlens[1:-1].long() - 1]  # not of the filling
    else:
        lengths = batch["tokens_lens"].long()
        last = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    return model.score(last).squeeze(-1).float()
