"""Sequence classification: a label for a text or a pair of texts, or with lists of labels any number of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.ops.cross_entropy import cross_entropy
from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data.batch import Batch, join, layout
from foveate.train.data.examples import Columns, Example, Examples, Parts, length_notes, text_of, too_long
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Objective
from foveate.train.objectives.labels import Classes, class_weights, labels_of


class Classification(Objective):
    """Rows: {"text", "label"}, or with "text_pair" too. classes: their names, in the order of their numbers, and how often each occurs.

    One class a row: cross-entropy. A list of classes: a yes or no for each (binary cross-entropy, summed over the classes). With
    class_weights the loss is the mean weighted by the row's class, as torch's; evaluation is not weighted.
    """

    head = "sequence-classification"
    classes: Classes

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int, classes: Classes) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self.classes, self.labels, self.several = classes, classes.names, classes.several
        self.weights = class_weights(config.class_weights, classes)
        if self.several and config.label_smoothing:
            raise ValueError("label_smoothing is for one class a row; omit it where rows have lists of classes")

    def signature(self) -> dict[str, Any]:
        fields = [self.config.text_field or "text", self.config.label_field]
        return {"fields": fields, "labels": self.labels, "several": self.several}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """tokens int32, types uint8, label int32 [1], or with lists of classes 0 or 1 for each."""
        texts: list[Any] = []
        labels = []
        for row in rows:
            text = text_of(row, self.config.text_field or "text")
            texts.append((text, text_of(row, "text_pair", "")) if "text_pair" in row else text)
            labels.append(self._label(row))
        encodings = self.tokenizer.backend.encode_batch(texts)
        return {
            "tokens": [np.array(e.ids, np.int32) for e in encodings],
            "types": [np.array(e.type_ids, np.uint8) for e in encodings],
            "label": labels,
        }

    def _label(self, row: dict[str, Any]) -> np.ndarray:
        found, several = labels_of(row, self.config.label_field)
        if several != self.several:
            raise ValueError(
                f"the label in {self.config.label_field!r} is {row[self.config.label_field]!r:.60}, and other rows have "
                f"{'lists of labels' if self.several else 'one label'}; give all rows the same"
            )
        numbers = [self.classes.number(label) for label in found]
        if not several:
            return np.array(numbers, np.int32)
        flags = np.zeros(len(self.labels), np.int32)
        flags[numbers] = 1
        return flags

    def examples(self, store: TokenStore) -> Examples:
        lengths = store.lengths("tokens") if len(store) else np.empty(0, np.int64)
        longer = too_long(self.config, lengths, self.max_length, "texts")
        if self.config.too_long == "truncate":
            longer[:] = False
        documents = np.flatnonzero(~longer)
        return Examples(documents, np.zeros_like(documents), np.minimum(lengths[documents], self.max_length))

    def notes(self, store: TokenStore) -> list[str]:
        lengths = store.lengths("tokens") if len(store) else np.empty(0, np.int64)
        return length_notes(self.config, lengths, self.max_length, "texts")

    def parts(self, store: TokenStore) -> Parts:
        default = super().parts(store)
        if self.several or not len(store):
            return default
        return default._replace(classes=np.asarray(store.values("label"), np.int64))

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        packing = self.config.packing
        packed, tensors = layout([example.length for example in examples], packing)
        kept = [
            truncated(store.get("tokens", p.document), store.get("types", p.document), self.max_length)
            for p in examples
        ]
        tensors["tokens"] = join([tokens for tokens, _ in kept], packing)
        tensors["types"] = join([types for _, types in kept], packing)
        labels = np.concatenate([store.get("label", example.document) for example in examples]).astype(np.int64)
        tensors["labels"] = torch.from_numpy(labels.reshape(len(examples), -1) if self.several else labels)
        norm = None
        if self.weights is not None:
            norm = float(self.weights[tensors["labels"]].sum())
        return Batch(tensors, packed, len(examples), sum(example.length for example in examples), norm)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        logits, labels = self._logits(model, batch), batch["labels"]
        if self.several:
            return _yes_or_no(logits, labels)
        options: dict[str, Any] = {"label_smoothing": self.config.label_smoothing, "z_loss": self.config.z_loss}
        if self.weights is None:
            return cross_entropy(logits, labels, reduction="sum", **options)
        losses = cross_entropy(logits, labels, reduction="none", **options)
        return (losses * self.weights.to(losses)[labels]).sum()

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        logits, labels = self._logits(model, batch), batch["labels"]
        classes = len(self.labels)
        if self.several:
            chosen, true = logits > 0, labels > 0
            right = (chosen == true).all(-1).sum()
            counts = [(chosen & true).sum(0), chosen.sum(0), true.sum(0)]
            loss = _yes_or_no(logits, labels)
        else:
            best = logits.argmax(-1)
            right = (best == labels).sum()
            counts = [x.bincount(minlength=classes) for x in (labels[best == labels], best, labels)]
            loss = cross_entropy(logits, labels, reduction="sum")
        return {"loss": loss, "accuracy": right, "f1": torch.stack(counts)}

    def metrics(self, means: dict[str, Tensor]) -> dict[str, float]:
        """f1: the mean over the classes that occur, or are answered, of 2 TP / (answered + true)."""
        right, answered, true = means.pop("f1")
        there = (answered + true) > 0
        f1 = (2 * right[there] / (answered + true)[there]).mean() if there.any() else torch.zeros(())
        return super().metrics(means | {"f1": f1})

    def _logits(self, model: Any, batch: Batch) -> Tensor:
        return model(batch["tokens"], batch["types"], **batch.padding())[: len(batch["labels"])]  # not of the filling


def _yes_or_no(logits: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum") / labels.shape[1]


def truncated(tokens: np.ndarray, types: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Without tokens before the last one of a text, of the longer one of a pair, until `longest` are left."""
    while len(tokens) > longest:
        first = int((types == 0).sum())
        pair = first < len(tokens)
        excess = len(tokens) - longest
        if not pair:
            cut, end = excess, first
        elif first >= len(tokens) - first:
            cut, end = min(excess, max(1, 2 * first - len(tokens))), first
        else:
            cut, end = min(excess, max(1, len(tokens) - 2 * first)), len(tokens)
        kept = np.ones(len(tokens), bool)
        kept[end - 1 - cut : end - 1] = False
        tokens, types = tokens[kept], types[kept]
    return tokens, types
