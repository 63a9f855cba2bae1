"""Strategy: where and in how many processes training runs. This one is a single process; others override its methods."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.train.checkpoints import state
from foveate.train.data.batch import Batch


class Strategy:
    """One process on one device. The loop calls nothing else that depends on the number of processes.

    Every process reads the same data plan, takes its share of each step's rows, and calls every method here at the same points.
    """

    rank = 0  # which share of each step's rows, of
    world_size = 1
    process = 0  # among all; processes of one rank share its rows
    gradient_factor = 1.0  # on a loss, so that gradients are those of the sum over all processes: DDP takes their mean

    @property
    def is_main(self) -> bool:
        """Whether this process prints, logs and writes what all processes have in common."""
        return self.process == 0

    def share(self, batch: Batch) -> Batch:
        """This process's part of a batch that the processes of its rank have in common."""
        return batch

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module that is called for the loss. Its parameters keep their names but for a prefix that `weights` takes off."""
        return module

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around the backward pass of one micro-batch; `last`: the one after which gradients must be complete."""
        yield

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, the same everywhere."""
        return values

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Scales the gradients to a norm of at most max_norm; the norm before."""
        return nn.utils.clip_grad_norm_(list(parameters), max_norm)

    def barrier(self) -> None:
        """Returns when every process is here."""

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does this before the others, which then find what it has written."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole weights by name on the main process, each storage once; called by all processes."""
        return {name: p.detach() for name, p in model.named_parameters()}

    def save_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]
    ) -> None:
        """What a run needs to go on, beside the exported weights: the trained parameters, the optimizer's state, the random state."""
        state.save(folder, model, optimizer, scalars)

    def load_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The inverse of save_state, whatever the number of processes that saved it; returns `scalars`."""
        if (folder / state.TENSORS).exists():
            return state.load(folder, model, optimizer)
        from foveate.train.checkpoints import sharded

        return sharded.load(folder, model, optimizer)
