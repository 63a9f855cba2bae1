"""Context parallelism: every rank of a group reads the same sequences and holds its part of each; attention goes round the ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from foveate.ring.attention import ring_attention
from foveate.ring.layout import sequence_multiple, sequence_positions, split_sequence
from foveate.train.data.batch import IGNORED, Batch


@dataclass(frozen=True)
class Spread:
    """What a model needs to know of sequences spread over a group, in place of `Packed`.

    positions: int64 [S / ranks] of this rank's tokens, each in its sequence; longest: tokens of a sequence, for the check of the
    model's positions; cu_seqlens: of a packed row, else None.
    """

    positions: Tensor
    longest: int
    cu_seqlens: tuple[int, ...] | None
    group: dist.ProcessGroup | None

    def to(self, device: Any) -> Spread:
        return Spread(self.positions.to(device), self.longest, self.cu_seqlens, self.group)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: None = None, **options: Any) -> Tensor:
        """`ring_attention` of this rank's [B, S / ranks, H, D]."""
        return ring_attention(q, k, v, group=self.group, cu_seqlens=self.cu_seqlens, **options)


def spread(batch: Batch, group: dist.ProcessGroup | None) -> Batch:
    """This rank's part of a causal language model's batch, which is the same on each rank of the group.

    Rows are filled up at their end, without a label, to a length that can be split; no token before sees that, and in a packed row it
    belongs to the filling. `target_count` is that of this rank's labels and the group's first rank counts the tokens, so that sums over the
    ranks are those of the whole batch.
    """
    if batch.tensors.keys() != {"tokens", "labels"}:
        raise ValueError(f"context parallelism is for causal-lm; this batch has {', '.join(batch.tensors)}")
    length = batch["tokens"].shape[1]
    fill = -length % sequence_multiple(group)
    tokens = split_sequence(F.pad(batch["tokens"], (0, fill)), group=group)
    labels = split_sequence(F.pad(batch["labels"], (0, fill), value=IGNORED), group=group)
    packed = batch.packed.get("tokens")
    # the filling may stand anywhere, but not beyond the model's positions
    if packed is None:
        positions, ends = (
            sequence_positions(length + fill, group=group, device=tokens.device).clamp(max=length - 1),
            None,
        )
    else:
        positions = split_sequence(F.pad(packed.positions, (0, fill)), dim=0, group=group)
        ends = (*packed.cu_seqlens[:-1].tolist(), length + fill)
    place: Any = Spread(positions, length if packed is None else packed.longest, ends, group)
    target_count, read = int((labels != IGNORED).sum()), batch.tokens if dist.get_rank(group) == 0 else 0
    return Batch({"tokens": tokens, "labels": labels}, {"tokens": place}, target_count, read)
