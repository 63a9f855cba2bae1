"""The reference of preference learning: the model as it was when the run began."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.progress import ProgressBar
from foveate.train.checkpoints.fingerprint import start_checksum
from foveate.train.data.batch import Batch
from foveate.train.data.examples import Example
from foveate.train.data.plan import best_fit
from foveate.train.modules.lora import adapters

FILE = "reference.safetensors"


class LiveReference:
    """The model at its start, to be run beside it: the base with its adapters off, or with those that it began with; without adapters
    a frozen copy, which takes the weights' memory once more."""

    def __init__(self, model: nn.Module) -> None:
        self._adapters = [module for _, module in adapters(model)]
        self._start: dict[str, Tensor] = {}
        self._copy: nn.Module | None = None
        if not self._adapters:
            self._copy = copy.deepcopy(model).requires_grad_(False).eval()
        elif any(bool(p.any()) for module in self._adapters for p in (module.second,)):
            self._start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[Any]:
        """The reference, without gradients and dropout. Nothing of `model` may be in a graph whose backward pass is in here."""
        training = model.training
        with torch.no_grad():
            if self._copy is not None:
                yield self._copy
                return
            model.eval()
            trained = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
            try:
                for module in self._adapters:
                    module.active = bool(self._start)
                for name, p in model.named_parameters():
                    if name in self._start:
                        p.data = self._start[name]
                yield model
            finally:
                for module in self._adapters:
                    module.active = True
                for name, p in model.named_parameters():
                    if name in self._start:
                        p.data = trained[name]
                model.train(training)


class PrecomputedReference:
    """Numbers of each document by the model at its start, float32 [documents, columns], by the checksum of the store."""

    def __init__(self) -> None:
        self._values: dict[str, np.ndarray] = {}

    def of(self, checksum: str, examples: list[Example]) -> Tensor:
        """[examples, columns]"""
        return torch.from_numpy(self._values[checksum][[example.document for example in examples]])

    def fill(
        self,
        model: nn.Module,
        data: list[tuple[Any, Any]],
        collate: Callable[[Any, list[Example]], Batch],
        compute: Callable[[nn.Module, Batch], Tensor],
        *,
        file: Path,
        room: int,
        columns: int,
        settings: str,
        progress: bool,
        write: bool,
    ) -> None:
        """Computes what `file` does not have yet, and keeps it there. data: stores and their examples. compute: [examples, columns].
        settings: what else the numbers depend on. room: tokens of a batch."""
        key = f"{start_checksum(model)} {settings}"
        known = _read(file, key)
        for store, examples in data:
            values = known.setdefault(store.checksum, np.full((len(store), columns), np.nan, np.float32))
            missing = (
                np.flatnonzero(np.isnan(values[examples.documents]).any(1)) if len(store) else np.empty(0, np.int64)
            )
            if not len(missing):
                continue
            device = next(model.parameters()).device
            training = model.training
            model.eval()
            rows = best_fit(examples.lengths[missing], max(room, int(examples.lengths[missing].max())))
            with (
                torch.no_grad(),
                ProgressBar("reference", "bar", "count", "remaining", total=len(rows), shown=progress) as bar,
            ):
                for row in rows:
                    of_row = [
                        Example(
                            int(examples.documents[i]), int(examples.starts[i]), int(examples.lengths[i]), (0, int(i))
                        )
                        for i in missing[row]
                    ]
                    found = compute(model, collate(store, of_row).to(device))
                    values[[example.document for example in of_row]] = found.float().cpu().numpy()
                    bar.advance(1)
            model.train(training)
        self._values = known
        if write:
            _write(file, key, known)


def _read(file: Path, key: str) -> dict[str, np.ndarray]:
    """What a file of the same key has; {} for another one, which is computed again."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return {}
    try:
        with safe_open(file, framework="numpy") as stored:
            if (stored.metadata() or {}).get("key") != key:
                return {}
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}); delete it, and the reference is computed again") from error


def _write(file: Path, key: str, values: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    new = file.with_suffix(".tmp")
    save_file(values, new, metadata={"key": key})
    new.replace(file)
