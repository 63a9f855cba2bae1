"""Learning from pairs of answers: DPO and its kin with a reference, SimPO and ORPO without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data.batch import IGNORED, Batch
from foveate.train.data.examples import Example
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Beginning
from foveate.train.objectives.head import label_counts, log_probs, sequence_sums, token_log_probs
from foveate.train.objectives.pairs import Pairs, halves, reward_metrics, sums_of
from foveate.train.objectives.reference import FILE, LiveReference, PrecomputedReference


def dpo_losses(
    chosen: Tensor, rejected: Tensor, *, beta: float, kind: str = "sigmoid", label_smoothing: float = 0.0
) -> Tensor:
    """The loss of each pair, from log(policy / reference) of its answers; for "ipo" these are means over the tokens of each.

    With d = chosen - rejected: "sigmoid" -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d) (Rafailov et al. 2023, arXiv 2305.18290;
    e = label_smoothing, the share of pairs that are the wrong way round), "hinge" max(0, 1 - beta d) (Zhao et al. 2023, arXiv
    2305.10425), "ipo" (d - 1 / (2 beta))**2 (Azar et al. 2023, arXiv 2310.12036).
    """
    d = chosen - rejected
    if kind == "hinge":
        return F.relu(1 - beta * d)
    if kind == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    return smoothed(beta * d, label_smoothing)


def smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x)"""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def simpo_losses(
    chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Tensor:
    """The loss of each pair, from mean log-probabilities of its answers' tokens: as DPO's sigmoid of beta (chosen - rejected) - gamma
    (Meng et al. 2024, arXiv 2405.14734)."""
    return smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log(odds(chosen) / odds(rejected)), odds = p / (1 - p), from mean log-probabilities of tokens."""
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0; a probability of 1 counts as one just below."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


class DPO(Pairs):
    """Rows: {"prompt", "chosen", "rejected"}, see `data.preferences.pair`. The reference is the model as it was at the start."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int) -> None:
        super().__init__(config, tokenizer, max_length)
        self._live: LiveReference | None = None
        self._kept = PrecomputedReference()

    def begin(self, beginning: Beginning) -> None:
        if self.config.reference == "live":
            self._live = LiveReference(beginning.model)
            return
        settings = f"{self.config.objective} {self.max_length} {self.config.precision}"
        self._kept.fill(
            beginning.model, beginning.data, super().collate, self._reference_of, file=beginning.folder / FILE, room=beginning.room,
            columns=2, settings=settings, progress=beginning.progress, write=beginning.writes,
        )  # fmt: skip

    def _reference_of(self, model: Any, batch: Batch) -> Tensor:
        with autocast(self.config, batch):
            return torch.stack(halves(log_probs(model, batch)), 1)

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        batch = super().collate(store, examples)
        if self._live is None:
            batch.tensors["reference"] = self._kept.of(store.checksum, list(examples))
        return batch

    def learn(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        if self._live is None:
            reference = batch["reference"]
        else:
            with self._live.running(model) as before:
                reference = torch.stack(halves(log_probs(before, batch)), 1)
        chosen, rejected = halves(log_probs(model, batch))
        ratios = chosen - reference[:, 0], rejected - reference[:, 1]
        config, beta = self.config, self.config.strength
        compared = ratios
        if config.kind_of_loss == "ipo":
            counts = halves(label_counts(batch))
            compared = ratios[0] / counts[0], ratios[1] / counts[1]
        smoothing = config.label_smoothing if torch.is_grad_enabled() else 0.0
        losses = dpo_losses(*compared, beta=beta, kind=config.kind_of_loss, label_smoothing=smoothing)
        return losses.sum(), reward_metrics(beta * ratios[0], beta * ratios[1], (chosen, rejected))

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        loss, sums = self.learn(model, batch)
        return {"loss": loss, **sums}


class SimPO(Pairs):
    """The same rows; no reference: an answer's reward is beta times the mean log-probability of its tokens."""

    def learn(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        sums = log_probs(model, batch)
        chosen, rejected = halves(sums / label_counts(batch))
        config, beta = self.config, self.config.strength
        smoothing = config.label_smoothing if torch.is_grad_enabled() else 0.0
        losses = simpo_losses(chosen, rejected, beta=beta, gamma=config.gamma, label_smoothing=smoothing)
        return losses.sum(), reward_metrics(beta * chosen, beta * rejected, halves(sums))

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        loss, sums = self.learn(model, batch)
        return {"loss": loss, **sums}


class ORPO(Pairs):
    """The same rows; no reference: the mean cross-entropy of all tokens of the chosen sequences, prompts too as TRL has it, minus
    beta log sigmoid(log odds ratio) (Hong et al. 2024, arXiv 2403.07691). The first is a mean over the tokens of the whole step."""

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        """all: labels of every token of the chosen sequences; nll_tokens: their number."""
        batch = super().collate(store, examples)
        every = torch.full_like(batch["labels"], IGNORED)
        packed = batch.packed.get("tokens")
        at = 0
        for i, example in enumerate(examples):
            chosen, rejected = (tokens for tokens, _ in self.sequences(store, example.document))
            place = (0, slice(at, at + len(chosen) - 1)) if packed is not None else (2 * i, slice(0, len(chosen) - 1))
            every[place] = torch.from_numpy(chosen[1:].astype("int64"))
            at += len(chosen) + len(rejected) - 2
        batch.tensors["all"] = every
        batch.tensors["nll_tokens"] = (every != IGNORED).sum()
        return batch

    def prepare(self, model: Any, batches: Sequence[Batch], total: Callable[[Tensor], Tensor]) -> None:
        counts = torch.tensor([[b.target_count, int(b["nll_tokens"])] for b in batches], dtype=torch.float64).sum(0)
        pairs, tokens = total(counts.to(next(model.parameters()).device)).cpu().tolist()
        for batch in batches:
            batch.tensors["nll_weight"] = torch.tensor(pairs / max(tokens, 1))

    def _parts(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The sums of the cross-entropy and of the rest of the loss, and what is reported."""
        hidden = model.hidden(batch["tokens"], packed=batch.packed.get("tokens"))
        answered, every = batch["labels"], batch["all"]
        # one pass over the head: the answers' labels are among all labels of the chosen sequences
        tokens = token_log_probs(model, hidden, torch.where(every != IGNORED, every, answered))
        sums = sequence_sums(tokens * (answered != IGNORED), batch)
        nll = -(tokens * (every != IGNORED)).sum()
        chosen, rejected = halves(sums / label_counts(batch))
        log_odds = log_odds_ratio(chosen, rejected)
        beta, ratio = self.config.strength, F.logsigmoid(log_odds)
        found = reward_metrics(beta * chosen, beta * rejected, halves(sums))
        return nll, -beta * ratio.sum(), found | sums_of({"log_odds_ratio": ratio, "log_odds_chosen": log_odds})

    def learn(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        nll, rest, found = self._parts(model, batch)
        return nll * batch["nll_weight"] + rest, found | {"nll": nll.detach(), "nll_tokens": batch["nll_tokens"]}

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        nll, rest, found = self._parts(model, batch)
        return {"loss": rest, "nll": nll, "nll_tokens": batch["nll_tokens"], **found}

    def metrics(self, means: dict[str, Tensor]) -> dict[str, float]:
        nll = means.pop("nll") / means.pop("nll_tokens")
        if "loss" in means:  # of an evaluation, whose tokens are counted at its end
            means["loss"] = means["loss"] + nll
        return super().metrics(means | {"nll_loss": nll})


def autocast(config: TrainConfig, batch: Batch) -> torch.autocast:
    """As the loop has it around the loss."""
    return torch.autocast(batch["tokens"].device.type, torch.bfloat16, enabled=config.precision == "bf16")
