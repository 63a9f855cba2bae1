"""KTO (Ethayarajh et al. 2024, arXiv 2402.01306): single answers that are known to be good or bad, without pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data import preferences
from foveate.train.data.batch import Batch
from foveate.train.data.examples import Columns, Example, Examples, Parts, length_notes, too_long
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Beginning, Objective
from foveate.train.objectives.head import log_probs
from foveate.train.objectives.pairs import encoded, side_of
from foveate.train.objectives.preferences import autocast
from foveate.train.objectives.reference import FILE, LiveReference, PrecomputedReference

_WHAT = "answers"


def kto_losses(
    ratios: Tensor, good: Tensor, kl: Tensor, *, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """The loss of each answer, from r = log(policy / reference): desirable (1 - sigmoid(beta (r - kl))) of a good one, undesirable
    (1 - sigmoid(beta (kl - r))) of a bad one."""
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, desirable, undesirable)
    return weight * (1 - torch.sigmoid(beta * sign * (ratios - kl)))


class KTO(Objective):
    """Rows: {"prompt", "completion", "label"}, true for a good completion; a row of {"prompt", "chosen", "rejected"} counts as two.

    kl is the mean of log(policy / reference) of answers to other prompts, 0 at least, over all answers of a step, in every process and
    accumulated batch: each prompt with the answer of the document before it, the first with the last one's. It is computed
    without gradient and dropout.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self._live: LiveReference | None = None
        self._kept = PrecomputedReference()

    def signature(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """tokens int32; target uint8, 1 for those of the answer; good uint8 [1]; first uint8 [1], 1 for the first answer of a row."""
        columns: Columns = {"tokens": [], "target": [], "good": [], "first": []}
        for row in rows:
            found = preferences.judged(row, self.tokenizer)
            for i, ((tokens, target), (_, good)) in enumerate(
                zip(encoded([sample for sample, _ in found], self.tokenizer), found)
            ):
                columns["tokens"].append(tokens)
                columns["target"].append(target)
                columns["good"].append(np.array([good], np.uint8))
                columns["first"].append(np.array([i == 0], np.uint8))
        return columns

    def parts(self, store: TokenStore) -> Parts:
        default = super().parts(store)
        if not len(store):
            return default
        return default._replace(groups=np.cumsum(store.values("first"), dtype=np.int64))

    def examples(self, store: TokenStore) -> Examples:
        if not len(store):
            return Examples(*(np.empty(0, np.int64) for _ in range(3)))
        left_out = self._left_out(store)
        documents = np.flatnonzero(~left_out)
        if not len(documents):
            raise ValueError(f"nothing can be learnt from the {len(store)} answers: {'; '.join(self.notes(store))}")
        lengths = [sum(len(tokens) - 1 for tokens, _ in self._both(store, int(d))) for d in documents]
        return Examples(documents, np.zeros_like(documents), np.array(lengths, np.int64))

    def notes(self, store: TokenStore) -> list[str]:
        if not len(store):
            return []
        lengths = store.lengths("tokens") - 1
        found = length_notes(self.config, lengths, self.max_length, _WHAT)
        empty = int((self._left_out(store) & (lengths <= self.max_length)).sum())
        if empty:
            found.append(f"{empty} of {len(store)} answers are empty and are left out")
        good = store.values("good")
        if good.all() or not good.any():
            found.append(f"all answers are {'good' if good.all() else 'bad'}; KTO learns from both kinds")
        return found

    def _left_out(self, store: TokenStore) -> np.ndarray:
        lengths = store.lengths("tokens") - 1
        left_out = too_long(self.config, lengths, self.max_length, _WHAT)
        if self.config.too_long == "truncate":
            left_out = np.zeros_like(left_out)
        for d in np.flatnonzero(~left_out):
            left_out[d] = not store.get("target", int(d))[1 : self.max_length + 1].any()
        return left_out

    def _both(self, store: TokenStore, document: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and targets of an answer, and of its prompt with the answer of the document before."""
        own = store.get("tokens", document), store.get("target", document)
        before = (document - 1) % len(store)
        other = store.get("tokens", before), store.get("target", before)
        own_start, start = int(np.argmax(own[1])), int(np.argmax(other[1]))
        mixed = [np.concatenate([mine[:own_start], theirs[start:]]) for mine, theirs in zip(own, other)]
        end = self.max_length + 1
        return [(own[0][:end], own[1][:end]), (mixed[0][:end], mixed[1][:end])]

    def _collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        both = [self._both(store, example.document) for example in examples]
        tensors, packed = side_of([own for own, _ in both], self.config.packing)
        more, more_packed = side_of([mixed for _, mixed in both], self.config.packing, "kl", "kl_labels")
        good = np.array([store.get("good", example.document)[0] for example in examples], bool)
        read = sum(len(tokens) - 1 for own in both for tokens, _ in own)
        return Batch({**tensors, **more, "good": torch.from_numpy(good)}, packed | more_packed, len(examples), read)

    def begin(self, beginning: Beginning) -> None:
        if self.config.reference == "live":
            self._live = LiveReference(beginning.model)
            return
        settings = f"kto {self.max_length} {self.config.precision}"
        self._kept.fill(
            beginning.model, beginning.data, self._collate, self._both_log_probs, file=beginning.folder / FILE, room=beginning.room,
            columns=2, settings=settings, progress=beginning.progress, write=beginning.writes,
        )  # fmt: skip

    def _both_log_probs(self, model: Any, batch: Batch) -> Tensor:
        with autocast(self.config, batch):
            return torch.stack([log_probs(model, batch), log_probs(model, batch, "kl", "kl_labels")], 1)

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        batch = self._collate(store, examples)
        if self._live is None:
            batch.tensors["reference"] = self._kept.of(store.checksum, list(examples))
        return batch

    @torch.no_grad()
    def prepare(self, model: Any, batches: Sequence[Batch], total: Callable[[Tensor], Tensor]) -> None:
        """kl, and where the reference is live what it says, in each batch."""
        training, device = model.training, next(model.parameters()).device
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch in batches:
            here = batch.to(device)
            if self._live is not None:
                with self._live.running(model) as before:
                    batch.tensors["reference"] = self._both_log_probs(before, here).cpu()
            ratios = log_probs(model, here, "kl", "kl_labels") - batch["reference"][:, 1].to(device)
            sums += torch.stack([ratios.double().sum(), sums.new_tensor(len(ratios))])
        model.train(training)
        ratio, count = total(sums).tolist()
        for batch in batches:
            batch.tensors["kl_mean"] = torch.tensor(max(ratio / max(count, 1), 0.0), dtype=torch.float32)

    def learn(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config, beta = self.config, self.config.strength
        found = log_probs(model, batch)
        ratios, good, kl = found - batch["reference"][:, 0], batch["good"], batch["kl_mean"]
        losses = kto_losses(
            ratios, good, kl, beta=beta, desirable=config.desirable_weight, undesirable=config.undesirable_weight
        )
        sums = {"kl": kl * len(ratios)}
        for name, chosen in (("chosen", good), ("rejected", ~good)):
            sums[f"count/{name}"] = chosen.sum()
            sums[f"rewards/{name}"] = (beta * ratios.detach() * chosen).sum()
            sums[f"logps/{name}"] = (found.detach() * chosen).sum()
        return losses.sum(), sums

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        loss, sums = self.learn(model, batch)
        return {"loss": loss, **sums}

    def metrics(self, means: dict[str, Tensor]) -> dict[str, float]:
        """The means of the good and of the bad answers, each by itself; 0 where there is none."""
        for name in ("chosen", "rejected"):
            share = means.pop(f"count/{name}").clamp(min=1e-12)
            for kind in ("rewards", "logps"):
                means[f"{kind}/{name}"] = means[f"{kind}/{name}"] / share
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return super().metrics(means)
