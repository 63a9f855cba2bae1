"""Weights under the names that the modules here have, for families whose checkpoints call them otherwise or fuse them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from foveate.files.checked import CheckpointError
from foveate.models.checkpoint.base import Blocks, Weights
from foveate.models.checkpoint.split import SPLITS, Part

# What a name may give way to another's: a pooler that a checkpoint has beside the head that is used.
_SPARE = re.compile(r"(\w+\.)?pooler\..*")
_BIAS = "_bias"
_STACKED = ("experts_", "oss_")  # splits by expert


class RenamedWeights:
    """names: (pattern, replacement) pairs for `re.sub`, applied in this order to each stored name.

    fused: the end of a module's name after that -> how it is split, see `SPLITS`; config: the model's, whose sizes say where.
    only: a pattern of the stored names that are read at all.
    """

    def __init__(
        self, weights: Weights, names: Sequence[tuple[str, str]], where: str, fused: Mapping[str, str] | None = None,
        config: Any = None, only: str | None = None,
    ) -> None:  # fmt: skip
        self._weights = weights
        self.linear_layout, self.nbytes, self.loaded_bytes = weights.linear_layout, weights.nbytes, weights.loaded_bytes
        self.expanded: dict[str, int] = getattr(weights, "expanded", {})
        self._where = where
        rules = [(re.compile(pattern), new) for pattern, new in names]
        self._stored: dict[str, tuple[str, Part | None]] = {}
        for stored in weights.names():
            if only is not None and re.match(only, stored) is None:
                continue
            name = stored
            for pattern, new in rules:
                name = pattern.sub(new, name)
            for new_name, part in self._parts(name, stored, fused or {}, config):
                self._add(new_name, stored, part)

    def _parts(
        self, name: str, stored: str, fused: Mapping[str, str], config: Any
    ) -> Iterator[tuple[str, Part | None]]:
        module, _, kind = name.rpartition(".")
        for end, split in fused.items():
            stacked = name if name.endswith(f".{end}") else module  # stacked experts may be parameters, not modules
            if not stacked.endswith(f".{end}"):
                continue
            if split.startswith(_STACKED):
                self._check_experts(stored, config.experts.count)
            leaf = kind if stacked is module else "bias" if end.endswith(_BIAS) else "weight"
            place = stacked.removesuffix(end) + end.rpartition(".")[0].removesuffix(".experts")
            for part_name, part in SPLITS[split](end, config):
                yield f"{place}.{part_name}.{leaf}", part
            return
        yield name, None

    def _check_experts(self, stored: str, count: int) -> None:
        """Before names and modules of as many experts as a config says are made."""
        value = self._weights.get(stored)
        held = value.shape[0] if isinstance(value, Tensor) and value.dim() > 1 else None
        if held is not None and held != count:
            raise CheckpointError(
                f"{stored} in {self._where} is of {held} experts, and the config says {count}; take the config of these weights"
            )

    def _add(self, name: str, stored: str, part: Part | None) -> None:
        if name in self._stored:
            kept, spare = self._stored[name][0], stored
            if _SPARE.fullmatch(kept):
                kept, spare = spare, kept
            if not _SPARE.fullmatch(spare):
                raise CheckpointError(f"{self._where} has both {kept} and {spare}, which are one weight; delete one")
            stored = kept
        self._stored[name] = (stored, part)

    def names(self) -> Iterable[str]:
        return self._stored

    def get(self, name: str) -> Tensor | Blocks:
        stored, part = self._stored[name]
        value = self._weights.get(stored)
        if part is None:
            return value
        try:
            return part(value)
        except CheckpointError as error:
            raise CheckpointError(f"{stored} in {self._where} cannot be divided: {error}") from error

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls it."""
        return self._stored[name][0]
