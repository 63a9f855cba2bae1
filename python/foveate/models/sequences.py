"""Sequences of different lengths one after the other in one row, instead of padded: what training uses."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.ops.attention.dense import attention
from foveate.ops.attention.varlen import attention_varlen


@dataclass(frozen=True)
class PackedSequences:
    """Where each sequence of a row of `total` tokens begins. Positions count within the sequence; nothing crosses its ends.

    cu_seqlens: int32 [sequences + 1], from 0 to total; positions: int64 [total]; longest: of all sequences.
    """

    cu_seqlens: Tensor
    positions: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> PackedSequences:
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        positions = torch.cat([torch.arange(length) for length in lengths] or [torch.empty(0, dtype=torch.long)])
        return cls(ends, positions, max(lengths, default=0))

    def to(self, device: torch.device) -> PackedSequences:
        return PackedSequences(self.cu_seqlens.to(device), self.positions.to(device), self.longest)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, keys: PackedSequences | None = None, **options: Any) -> Tensor:
        """`attention_varlen` of [1, total, H, D]. keys: the sequences of k and v if not these."""
        keys = keys or self
        lengths = (self.cu_seqlens, keys.cu_seqlens, self.longest, keys.longest)
        return attention_varlen(q[0], k[0], v[0], *lengths, **options)[None]

    def attend_batch(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`attention` of some of these sequences that were laid out as a batch [n, S, H, D], for what `attention_varlen` has not."""
        return attention(q, k, v, **options)

    @property
    def starts(self) -> Tensor:
        """int64 [sequences]: the first token of each."""
        return self.cu_seqlens[:-1].long()


def attend(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedSequences | None, keys: PackedSequences | None = None, **options: Any
) -> Tensor:
    """`attention` of [B, S, H, D], or what `packed` makes of it. keys: the sequences of k and v if not those of q."""
    return attention(q, k, v, **options) if packed is None else packed.attend(q, k, v, keys, **options)


def check_positions(tokens: Tensor, packed: PackedSequences | None, max_positions: int, cure: str = "") -> None:
    """ValueError for sequences longer than the model's positions."""
    longest = tokens.shape[-1] if packed is None else packed.longest
    if longest > max_positions:
        raise ValueError(f"{longest} tokens do not fit the model's {max_positions} positions{cure}")
