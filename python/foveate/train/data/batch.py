"""Batch: tensors of one forward pass, sequences packed in one row or padded on the right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.models.sequences import PackedSequences

IGNORED = -100  # a label without a loss
# Packed rows are filled up to a multiple of this: oneDNN compiles and keeps a kernel for each number of tokens that it meets.
STEP = 16


@dataclass
class Batch:
    """tensors: int64, [1, total] if packed, else [B, S]. target_count: how many tokens, examples or answers the loss is a mean of;
    norm: what its sum is divided by in training if not by that: the sum of their weights.

    packed: where the sequences lie, one entry for each side ("tokens"; "source" and "target"), empty when padded. The last one is
    filling, with ignored labels.
    """

    tensors: dict[str, Tensor]
    packed: dict[str, PackedSequences]
    target_count: int
    tokens: int  # read by the model, without padding
    norm: float | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def to(self, device: torch.device) -> Batch:
        tensors = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        packed = {name: p.to(device) for name, p in self.packed.items()}
        return Batch(tensors, packed, self.target_count, self.tokens, self.norm)

    def padding(self, side: str = "tokens") -> dict[str, Any]:
        """The options of an encoder's forward pass that say where the sequences are."""
        return {"packed": self.packed[side]} if side in self.packed else {"kv_lens": self.tensors[f"{side}_lens"]}


def filling(total: int) -> int:
    """Tokens after `total` of them, at least one."""
    return STEP - total % STEP


def join(sequences: Sequence[np.ndarray], packing: bool, fill: int = 0) -> Tensor:
    """int64 [1, total], or [B, longest], filled up with `fill` on the right."""
    if packing:
        whole = torch.from_numpy(np.concatenate(sequences).astype(np.int64))
        return F.pad(whole, (0, filling(len(whole))), value=fill)[None]
    out = torch.full((len(sequences), max(map(len, sequences))), fill, dtype=torch.int64)
    for row, sequence in zip(out, sequences):
        row[: len(sequence)] = torch.from_numpy(sequence.astype(np.int64))
    return out


def layout(
    lengths: Sequence[int], packing: bool, side: str = "tokens"
) -> tuple[dict[str, PackedSequences], dict[str, Tensor]]:
    """`packed` of a batch, or the tensor of its lengths."""
    if packing:
        return {side: PackedSequences.of([*lengths, filling(sum(lengths))])}, {}
    return {}, {f"{side}_lens": torch.tensor(lengths, dtype=torch.int32)}
