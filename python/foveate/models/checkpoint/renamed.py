"""Weights under the names that the modules here have, for families whose checkpoints call them otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor

from foveate.files.checked import CheckpointError
from foveate.models.checkpoint.base import Blocks, Weights

# What a name may give way to another's: a pooler that a checkpoint has beside the head that is used.
_SPARE = re.compile(r"(\w+\.)?pooler\..*")


class RenamedWeights:
    """names: (pattern, replacement) pairs for `re.sub`, applied in this order to each stored name."""

    def __init__(self, weights: Weights, names: Sequence[tuple[str, str]], where: str) -> None:
        self._weights = weights
        self.linear_layout, self.nbytes, self.loaded_bytes = weights.linear_layout, weights.nbytes, weights.loaded_bytes
        rules = [(re.compile(pattern), new) for pattern, new in names]
        self._stored: dict[str, str] = {}
        for stored in weights.names():
            name = stored
            for pattern, new in rules:
                name = pattern.sub(new, name)
            if name in self._stored:
                kept, spare = self._stored[name], stored
                if _SPARE.fullmatch(kept):
                    kept, spare = spare, kept
                if not _SPARE.fullmatch(spare):
                    raise CheckpointError(f"{where} has both {kept} and {spare}, which are one weight; delete one")
                stored = kept
            self._stored[name] = stored

    def names(self) -> Iterable[str]:
        return self._stored

    def get(self, name: str) -> Tensor | Blocks:
        return self._weights.get(self._stored[name])

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls it."""
        return self._stored[name]
