"""Objective: what a task adds to the loop: how rows become tokens, tokens become batches, batches become a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data.batch import Batch
from foveate.train.data.examples import Columns, Example, Examples, Parts
from foveate.train.data.token_store import TokenStore

if TYPE_CHECKING:
    from foveate.train.objectives.labels import Classes


@dataclass(frozen=True)
class Beginning:
    """What an objective may look at before the first step, and before a state is loaded: the weights are those of the start.

    data: each store with its examples, of training and evaluation. room: tokens of a batch. writes: of one process."""

    model: nn.Module
    data: list[tuple[TokenStore, Examples]]
    folder: Path
    room: int
    progress: bool
    writes: bool


class Objective:
    """A task's part in a run; a subclass says what is not said here. The loss is a mean over a batch's targets, which are tokens, windows
    or examples: `target_count` of them."""

    perplexity = False  # whether exp(loss) is one
    head: str | None = None  # of load_model
    classes: Classes | None = None  # what a classifier tells apart
    packs_examples = True  # whether config.packing fills the rows of the data; else a row is an example
    steps_per_row = 1  # optimizer steps on the same rows
    max_length: int
    config: TrainConfig
    tokenizer: Tokenizer

    def signature(self) -> dict[str, Any]:
        """What `encode` depends on, beside the rows and the tokenizer; part of the cache's key."""
        raise NotImplementedError

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """Ragged columns, an array for each document."""
        raise NotImplementedError

    def examples(self, store: TokenStore) -> Examples:
        """ValueError for data that cannot be learnt from."""
        raise NotImplementedError

    def notes(self, store: TokenStore) -> list[str]:
        """What `examples` leaves out or cuts, a sentence each."""
        return []

    def parts(self, store: TokenStore) -> Parts:
        count = len(store)
        return Parts(np.arange(count), np.zeros(count, np.int64), np.zeros(count, bool))

    def end_of_turn(self, store: TokenStore) -> int | None:
        """A token that the data teach as an end of answers, None for no other than the tokenizer has."""
        return None

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        raise NotImplementedError

    def begin(self, beginning: Beginning) -> None:
        """Called once, before the first step."""

    def batches(
        self, model: Any, store: TokenStore, groups: Sequence[Sequence[Example]], step: int | None
    ) -> list[Batch]:
        """What is learnt in a step from these examples, a batch for each forward pass; step None: what is measured."""
        return [self.collate(store, group) for group in groups]

    def prepare(self, model: Any, batches: Sequence[Batch], total: Callable[[Tensor], Tensor]) -> None:
        """May add what the loss needs of all batches of a step together. total: a sum over all processes, each of which calls it alike."""

    def state(self) -> dict[str, Tensor]:
        """What a run that goes on needs beside weights, optimizer and random state."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The sum over the batch's targets."""
        raise NotImplementedError

    def learn(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and other sums over the targets that are reported as `metrics` makes them."""
        return self.loss(model, batch), {}

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """ "loss" and other sums over the targets of a batch of evaluation data, such as "accuracy"; numbers or vectors."""
        return {"loss": self.loss(model, batch)}

    def metrics(self, means: dict[str, Tensor]) -> dict[str, float]:
        """What is reported of the means over all targets of the evaluation data."""
        return {name: float(value) for name, value in means.items()}

    def task_metrics(self, model: nn.Module) -> dict[str, float]:
        """What needs the whole evaluation data as it was read, such as F1; {} if nothing does."""
        return {}
