"""Distillation (Hinton et al. 2015, arXiv 1503.02531): a model learns the next-token distribution of a teacher."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.models import load_model, open_checkpoint
from foveate.models.registry import architecture_of
from foveate.ops.cross_entropy import linear_cross_entropy
from foveate.ops.distillation import linear_distillation
from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data.batch import IGNORED, Batch
from foveate.train.modules.linear import speed_up_linear
from foveate.train.objectives.base import Beginning
from foveate.train.objectives.causal_lm import CausalLM
from foveate.train.objectives.head import operands, scaled


class Distillation(CausalLM):
    """Rows as causal-lm has them; the divergence is a mean over the same tokens. See `linear_distillation`.

    hidden_weight w adds w times the mean square of the difference of the last hidden states, which must be of one size; label_weight
    the cross-entropy with the data's tokens. Where one vocabulary is padded further than the other, its last rows are left out.
    """

    perplexity = False  # of the divergence there is none; `metrics` has that of the data's tokens

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int, hidden_size: int | None) -> None:
        super().__init__(config, tokenizer, max_length)
        if config.teacher is None:
            raise ValueError("distill needs a teacher")
        self._checkpoint = open_checkpoint(config.teacher)
        self._teacher: Any = None
        settings = self._checkpoint.config
        if "distill" not in architecture_of(settings).objectives:
            raise ValueError(
                f"the teacher {config.teacher} is a {settings.get('model_type')}, and must be a causal language model"
            )
        theirs = self._checkpoint.tokenizer()
        if theirs is None or theirs.backend.get_vocab() != tokenizer.backend.get_vocab():
            raise ValueError(
                f"the teacher {config.teacher} has {'no' if theirs is None else 'another'} tokenizer; a student learns from a teacher "
                "of the same tokens"
            )
        size = settings.get("hidden_size") or settings.get("n_embd")
        if config.hidden_weight and size != hidden_size:
            raise ValueError(
                f"hidden_weight compares hidden states of one size; the teacher's have {size} numbers, and the student's {hidden_size}"
            )

    def begin(self, beginning: Beginning) -> None:
        device = next(beginning.model.parameters()).device
        self._teacher = load_model(
            self._checkpoint, device=device, dtype=torch.float32, quantization="none", progress=beginning.progress
        ).requires_grad_(False)
        speed_up_linear(self._teacher)
        longest = self._teacher.config.max_positions
        if longest < self.max_length:
            raise ValueError(
                f"the teacher's context is {longest} tokens, and max_length={self.max_length}; choose a lower one"
            )

    def learn(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config, packed = self.config, batch.packed.get("tokens")
        at = batch["labels"] != IGNORED
        labels = batch["labels"][at]
        hidden = model.hidden(batch["tokens"], packed=packed)[at]
        with torch.no_grad():
            seen = self._teacher.hidden(batch["tokens"], packed=packed)[at]
            theirs, their_options = scaled(self._teacher, seen)
            theirs, their_weight, their_bias = operands(self._teacher.lm_head, theirs)
        ours, options = scaled(model, hidden)
        ours, weight, bias = operands(model.lm_head, ours)
        rows = min(len(weight), len(their_weight))
        loss = linear_distillation(
            ours, weight[:rows], theirs, their_weight[:rows], bias=None if bias is None else bias[:rows],
            teacher_bias=None if their_bias is None else their_bias[:rows], kind=config.kind_of_loss, beta=config.strength,
            temperature=config.temperature, top_k=config.teacher_top_k, softcap=options["softcap"],
            teacher_softcap=their_options["softcap"],
        )  # fmt: skip
        found = {"divergence": loss.detach()}
        if config.hidden_weight:
            error = (hidden.float() - seen.float()).square().mean(-1).sum()
            loss = loss + config.hidden_weight * error
            found["hidden_error"] = error.detach()
        if config.label_weight or not torch.is_grad_enabled():
            cross_entropy = linear_cross_entropy(ours, weight, labels, bias=bias, reduction="sum", **options)
            loss = loss + config.label_weight * cross_entropy
            found["cross_entropy"] = cross_entropy.detach()
        return loss, found

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        loss, sums = self.learn(model, batch)
        return {"loss": loss, **sums}

    def metrics(self, means: dict[str, Tensor]) -> dict[str, float]:
        found = super().metrics(means)
        if "cross_entropy" in found:
            found["perplexity"] = math.exp(min(found["cross_entropy"], 700.0))
        return found
