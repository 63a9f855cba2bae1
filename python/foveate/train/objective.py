"""Objective: what a task adds to the loop: how rows become tokens, tokens become batches, batches become a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor, nn

from foveate.train.batch import Batch
from foveate.train.data_files import CONTINUES
from foveate.train.store import TokenStore

Columns = dict[str, list[np.ndarray]]


class Pieces(NamedTuple):
    """Every sequence that a store gives: its document, its first token in it, and how many tokens the model reads; int64 each."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Piece(NamedTuple):
    document: int
    start: int
    length: int
    draw: tuple[int, int]  # (pass over the data, number of the piece): what masks are drawn from, with the run's seed


class Objective(Protocol):
    """The loss is a mean over a batch's `units`: target tokens, windows, examples."""

    perplexity: bool  # whether exp(loss) is one
    head: str | None  # of load_model
    max_length: int

    def signature(self) -> dict[str, Any]:
        """What `encode` depends on, beside the rows and the tokenizer; part of the cache's key."""
        ...

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """Ragged columns, an array for each document."""
        ...

    def pieces(self, store: TokenStore) -> Pieces:
        """ValueError for data that cannot be learnt from."""
        ...

    def collate(self, store: TokenStore, pieces: Sequence[Piece]) -> Batch: ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The sum over the batch's units."""
        ...

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """ "loss" and other sums over the units of a batch of evaluation data, such as "accuracy"."""
        ...

    def task_metrics(self, model: nn.Module) -> dict[str, float]:
        """What needs the whole evaluation data as it was read, such as F1; {} if nothing does."""
        ...


def text_of(row: dict[str, Any], field: str, cure: str = ": set text_field, or name the field so") -> str:
    """ValueError for a row without it."""
    if isinstance(row.get(field), str):
        return row[field]
    names = ", ".join(repr(name) for name in row if name != CONTINUES) or "none"
    found = f", but a {type(row[field]).__name__}" if field in row else ""
    raise ValueError(f"there is no text in {field!r}{found}; the fields are {names}{cure}")


def at_row(row: dict[str, Any], error: Exception) -> ValueError:
    return ValueError(f"{getattr(row, 'place', 'a row')}: {error}")
