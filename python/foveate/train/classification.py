"""Sequence classification: a label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.loss import cross_entropy
from foveate.tokenizer import Tokenizer
from foveate.train.batch import Batch, join, layout
from foveate.train.config import TrainConfig
from foveate.train.objective import Columns, Piece, Pieces, at_row, text_of
from foveate.train.store import TokenStore


class Classification:
    """Rows: {"text", "label"}, or with "text_pair" too. labels: the names of the classes, in the order of their numbers."""

    perplexity = False
    head: str | None = "sequence-classification"

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int, labels: list[str]) -> None:
        self.config, self.tokenizer, self.max_length, self.labels = config, tokenizer, max_length, labels
        self._number = {label: i for i, label in enumerate(labels)}

    def signature(self) -> dict[str, Any]:
        return {"fields": [self.config.text_field, self.config.label_field], "labels": self.labels}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """tokens int32, types uint8, label int32 [1]."""
        texts: list[Any] = []
        for row in rows:
            text = text_of(row, self.config.text_field)
            label = label_of(row, self.config.label_field)
            if label not in self._number:
                raise ValueError(f"the label {label!r} is not one of the training data's, {', '.join(self.labels)}")
            texts.append((text, text_of(row, "text_pair", "")) if "text_pair" in row else text)
        encodings = self.tokenizer.backend.encode_batch(texts)
        return {
            "tokens": [np.array(e.ids, np.int32) for e in encodings],
            "types": [np.array(e.type_ids, np.uint8) for e in encodings],
            "label": [np.array([self._number[label_of(row, self.config.label_field)]], np.int32) for row in rows],
        }

    def pieces(self, store: TokenStore) -> Pieces:
        lengths = store.lengths("tokens") if len(store) else np.empty(0, np.int64)
        fits = lengths <= self.max_length
        if not fits.all() and self.config.too_long == "error":
            raise ValueError(
                f"{int((~fits).sum())} of {len(fits)} texts are longer than max_length={self.max_length} tokens, the longest has "
                f"{int(lengths.max())}; raise max_length, or leave them out with too_long='drop'"
            )
        documents = np.flatnonzero(fits)
        return Pieces(documents, np.zeros_like(documents), lengths[fits])

    def collate(self, store: TokenStore, pieces: Sequence[Piece]) -> Batch:
        packing = self.config.packing
        packed, tensors = layout([piece.length for piece in pieces], packing)
        for name in ("tokens", "types"):
            tensors[name] = join([store.get(name, piece.document) for piece in pieces], packing)
        labels = np.concatenate([store.get("label", piece.document) for piece in pieces])
        tensors["labels"] = torch.from_numpy(labels.astype(np.int64))
        return Batch(tensors, packed, len(pieces), sum(piece.length for piece in pieces))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return cross_entropy(
            self._logits(model, batch), batch["labels"], reduction="sum", label_smoothing=self.config.label_smoothing,
            z_loss=self.config.z_loss,
        )  # fmt: skip

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        logits, labels = self._logits(model, batch), batch["labels"]
        return {"loss": cross_entropy(logits, labels, reduction="sum"), "accuracy": (logits.argmax(-1) == labels).sum()}

    def _logits(self, model: Any, batch: Batch) -> Tensor:
        return model(batch["tokens"], batch["types"], **batch.padding())[: len(batch["labels"])]  # not of the filling

    def task_metrics(self, model: torch.nn.Module) -> dict[str, float]:
        return {}


def label_of(row: dict[str, Any], field: str) -> str:
    if row.get(field) is None:
        raise ValueError(f"there is no label in {field!r}; the fields are {', '.join(map(repr, row))}: set label_field")
    if isinstance(row[field], (list, dict)):
        raise ValueError(f"the label in {field!r} is {row[field]!r}; it must be one class, a text or a number")
    return str(row[field])


def class_names(rows: Iterable[dict[str, Any]], field: str, known: Sequence[str]) -> list[str]:
    """The checkpoint's classes if they are all that occur; else those that occur, in the order of numbers or of the alphabet.

    ValueError for rows without a label, and for a single class.
    """
    found: set[str] = set()
    for row in rows:
        try:
            found.add(label_of(row, field))
        except ValueError as error:
            raise at_row(row, error) from error
    if found and found <= set(known):
        return list(known)
    if len(found) == 1:
        raise ValueError(f"all rows have the label {found.pop()!r}; a classifier needs rows of two classes or more")
    numbers = all(label.lstrip("-").isdigit() for label in found)
    return sorted(found, key=int) if numbers else sorted(found)
