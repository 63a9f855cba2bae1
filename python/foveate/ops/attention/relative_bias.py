"""T5's bucketed relative position bias, given to attention as its small table rather than as a [Hq, Sq, Skv] tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.backend.reference import attention as reference
from foveate.ops.checks import check_flag, check_integer, check_strided


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """bias[h, i, j] = table[bucket(j - (i + Skv - Sq)), h], as in T5 (Raffel et al. 2020, arXiv 1910.10683).

    table: [buckets, Hq], any float dtype, differentiable: the weight of T5's `relative_attention_bias` embedding.
    bidirectional: half of the buckets are for keys after the query (encoder); without it those share bucket 0 (decoder).
    max_distance: distances from here on share the last bucket of their side.
    The last query sits at the last key, as everywhere in foveate; with kv_lens, Skv is kv_lens[b].
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128

    def __post_init__(self) -> None:
        check_strided("RelativeBias.table", self.table)
        bidirectional = check_flag("RelativeBias.bidirectional", self.bidirectional)
        max_distance = check_integer("RelativeBias.max_distance", self.max_distance)
        if max_distance is not self.max_distance or bidirectional is not self.bidirectional:  # of numpy
            object.__setattr__(self, "max_distance", max_distance)
            object.__setattr__(self, "bidirectional", bidirectional)
        if self.table.dim() != 2 or not self.table.is_floating_point():
            raise ValueError(
                f"RelativeBias.table must be a float tensor [buckets, Hq], got {self.table.dtype} of shape "
                f"{tuple(self.table.shape)}"
            )
        buckets = self.table.shape[0]
        side = buckets // 2 if self.bidirectional else buckets
        if side < 2 or not side // 2 < self.max_distance < 2**31:
            raise ValueError(
                f"RelativeBias has {buckets} buckets, {side} for each direction, and max_distance={self.max_distance}; "
                "it needs at least 2 for each direction and a max_distance beyond half of them, below 2**31"
            )

    def materialize(self, Sq: int, Skv: int) -> Tensor:
        """The bias as a tensor [1, Hq, Sq, Skv], differentiable in table: for checks and for other attention functions."""
        device = self.table.device
        i = torch.arange(Sq, device=device)[:, None]
        j = torch.arange(Skv, device=device)[None, :]
        buckets = reference.relative_buckets(
            j - (i + Skv - Sq), self.table.shape[0], self.bidirectional, self.max_distance
        )
        return self.table[buckets].permute(2, 0, 1)[None]
