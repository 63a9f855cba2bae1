"""What an open checkpoint is: its config, tokenizer and weights, in whichever format they lie on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from foveate.tokenizer import Tokenizer


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix as GGUF stores it: blocks uint8 [out, in / 32 * bytes of a block]; format: "q8_0", "q4_0" or "q4_1"."""

    blocks: Tensor
    format: str
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.blocks.shape[0], self.in_features)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


class Weights(Protocol):
    """Where weights come from. Names are Hugging Face's; tensors are views of the memory-mapped file where that is possible."""

    linear_layout: bool  # every matrix is [out, in], also those that Hugging Face stores the other way round
    nbytes: int  # in the files
    loaded_bytes: int  # in memory, as `load_model` reads them without other options

    def names(self) -> Iterable[str]: ...

    def get(self, name: str) -> Tensor | Blocks: ...


@dataclass
class Checkpoint:
    """A model on disk. config has config.json's keys, also for GGUF files; generation_config is {} where there is none."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint has none."""
        raise NotImplementedError

    def weights(self) -> Weights:
        raise NotImplementedError
