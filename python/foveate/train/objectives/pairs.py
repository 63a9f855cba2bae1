"""Pairs of sequences that are learnt together: a chosen and a rejected answer, tokenised, packed, and told apart in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data import chat, preferences
from foveate.train.data.batch import IGNORED, Batch, join, layout
from foveate.train.data.examples import Columns, Example, Examples, length_notes, too_long
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Objective


def encoded(samples: Sequence[chat.Sample], tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tokens of each sample, int32, and which of them are the answer's, uint8."""
    backend, end_id = tokenizer.backend, min(tokenizer.eos_ids, default=None)
    found = []
    for sample in samples:
        encoding = backend.encode(sample.text, add_special_tokens=not sample.rendered)
        tokens, target = chat.tokens_of(sample, encoding, backend, end_id)
        found.append((np.array(tokens, np.int32), np.array(target, np.uint8)))
    return found


class Pairs(Objective):
    """Two sequences a document, in columns of these names. A batch has them one after the other: chosen, rejected, chosen, ...

    An example's length is that of both. One of them that is longer than max_length is an error, or leaves the pair out, or is cut at its
    end; a pair of which an answer then has no token is left out, and so is one of equal sequences.
    """

    names = ("chosen", "rejected")
    what = "pairs"
    predicts = True  # the tokens after each, so that the last one is not read

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length

    def signature(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """For each of the two: tokens int32, and target uint8, 1 for those of the answer. margin float32 [1]: see `reward`."""
        columns: Columns = {name: [] for side in self.names for name in (side, f"{side}_target")}
        columns["margin"] = []
        for row in rows:
            for side, (tokens, target) in zip(
                self.names, encoded(preferences.pair(row, self.tokenizer), self.tokenizer)
            ):
                columns[side].append(tokens)
                columns[f"{side}_target"].append(target)
            columns["margin"].append(np.array([self.margin(row)], np.float32))
        return columns

    def margin(self, row: dict[str, Any]) -> float:
        return 0.0

    def examples(self, store: TokenStore) -> Examples:
        read, _, left_out = self._documents(store)
        documents = np.flatnonzero(~left_out)
        if len(store) and not len(documents):
            raise ValueError(f"nothing can be learnt from the {len(store)} {self.what}: {'; '.join(self.notes(store))}")
        return Examples(documents, np.zeros_like(documents), read.sum(0)[documents])

    def notes(self, store: TokenStore) -> list[str]:
        _, longest, left_out = self._documents(store)
        found = length_notes(self.config, longest, self.max_length, self.what)
        empty = int((left_out & (longest <= self.max_length)).sum())
        if empty:
            found.append(
                f"{empty} of {len(store)} {self.what} have the same answer twice, or an empty one, and are left out"
            )
        return found

    def _documents(self, store: TokenStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """How many tokens of each sequence are read [2, documents], those of the longer one, and whether the document is left out."""
        if not len(store):
            return np.zeros((2, 0), np.int64), np.zeros(0, np.int64), np.zeros(0, bool)
        lengths = np.stack([store.lengths(name) for name in self.names]) - self.predicts
        longest = lengths.max(0)
        left_out = too_long(self.config, longest, self.max_length, self.what)
        if self.config.too_long == "truncate":
            left_out = np.zeros_like(left_out)
        read = np.minimum(lengths, self.max_length)
        for d in np.flatnonzero(~left_out):
            left_out[d] = not self.teaches(store, int(d), read[:, d])
        return read, longest, left_out

    def teaches(self, store: TokenStore, document: int, read: np.ndarray) -> bool:
        """Whether both answers have a token within what is read, and differ there."""
        both = [store.get(name, document)[: n + self.predicts] for name, n in zip(self.names, read)]
        targets = [store.get(f"{name}_target", document)[: n + self.predicts] for name, n in zip(self.names, read)]
        return all(target[1:].any() for target in targets) and not np.array_equal(both[0], both[1])

    def sequences(self, store: TokenStore, document: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and targets of each of the two, as far as they are read."""
        end = self.max_length + self.predicts
        return [(store.get(name, document)[:end], store.get(f"{name}_target", document)[:end]) for name in self.names]

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        pairs = [pair for example in examples for pair in self.sequences(store, example.document)]
        tensors, packed = side_of(pairs, self.config.packing)
        return Batch(tensors, packed, len(examples), sum(len(tokens) - 1 for tokens, _ in pairs))


def side_of(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]], packing: bool, side: str = "tokens", labels: str = "labels"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and `packed` of a batch of sequences with their targets, each token predicting the next."""
    inputs = [tokens[:-1] for tokens, _ in sequences]
    wanted = [np.where(target[1:], tokens[1:], IGNORED) for tokens, target in sequences]
    packed, tensors = layout([len(x) for x in inputs], packing, side)
    return {**tensors, side: join(inputs, packing), labels: join(wanted, packing, IGNORED)}, packed


def sums_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is reported of a value for each pair: detached sums."""
    return {name: value.detach().float().sum() for name, value in values.items()}


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the chosen and of the rejected sequences."""
    first, second = values.unflatten(0, (-1, 2)).unbind(1)
    return first, second


def reward_metrics(chosen: Tensor, rejected: Tensor, log_probs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """TRL's names, from the implicit rewards of the two answers and their log-probabilities."""
    return sums_of({
        "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected, "logps/chosen": log_probs[0], "logps/rejected": log_probs[1],
    })  # fmt: skip
