"""Sequences packed one after the other, padded and back, and caches told key by key: what flash_attn's rarer options need."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lengths_of(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens[1:] - cu_seqlens[:-1]


def sequence_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [total]: the sequence of each packed row."""
    rows = torch.arange(total, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows.to(cu_seqlens.dtype), right=True).clamp_(
        max=max(cu_seqlens.shape[0] - 2, 0)
    )


def positions_of(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 [total]: the place of each packed row in its sequence."""
    return torch.arange(total, device=cu_seqlens.device) - cu_seqlens.long()[sequence_of(cu_seqlens, total)]


def padded_places(cu_seqlens: Tensor, total: int, longest: int, *, right: bool) -> Tensor:
    """int64 [total]: the row of [B * longest] for each packed row; right: the last rows of a sequence stand at the end."""
    sequence = sequence_of(cu_seqlens, total)
    places = sequence * longest + positions_of(cu_seqlens, total)
    return places + (longest - lengths_of(cu_seqlens).long())[sequence] if right else places


def pad(x: Tensor, places: Tensor, B: int, longest: int) -> Tensor:
    """Packed [total, ...] to [B, longest, ...], zeros elsewhere. Differentiable."""
    padded = x.new_zeros(B * longest, *x.shape[1:])
    return padded.index_put((places,), x).unflatten(0, (B, longest))


def used_rows(cu_seqlens: Tensor, seqused: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(rows, cu_seqlens) of the first seqused[b] rows of each sequence, int64 [used] and int32 [B + 1]. Reads back from the device."""
    kept = positions_of(cu_seqlens, total) < seqused.long()[sequence_of(cu_seqlens, total)]
    kept &= torch.arange(total, device=kept.device) < cu_seqlens[-1]
    used = torch.minimum(seqused.int(), lengths_of(cu_seqlens).int())
    return kept.nonzero().flatten(), F.pad(used.cumsum(0, dtype=torch.int32), (1, 0))


def paged_rows(
    block_table: Tensor, page_size: int, lengths: Tensor, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(rows, cu_seqlens) of the keys `start` to `start + lengths` of each sequence in pages flattened to rows. Reads back."""
    longest = int(lengths.max()) if lengths.numel() else 0
    place = torch.arange(longest, device=block_table.device)[None].expand(lengths.shape[0], -1)
    kept = place < lengths[:, None]
    place = place if start is None else place + start[:, None]
    page = block_table.long().gather(1, (place // page_size).clamp(max=block_table.shape[1] - 1))
    return (page * page_size + place % page_size)[kept], F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def key_table(rows: Tensor | None, block_table: Tensor | None, page_size: int, B: int, start: Tensor) -> Tensor:
    """int32 [B, keys]: where each key from `start` on is in a cache flattened to single keys, as pages of size 1.

    A dense cache has sequences of page_size keys in its rows (the b-th, or rows[b]); a paged one says where by block_table.
    """
    if block_table is None:
        first = torch.arange(B, device=start.device) if rows is None else rows.long()
        block_table = first.reshape(B, 1)
    capacity = block_table.shape[1] * page_size
    place = (start.long()[:, None] + torch.arange(capacity, device=start.device)).clamp_(max=capacity - 1)
    return (block_table.long().gather(1, place // page_size) * page_size + place % page_size).int()


def single_keys(cache: Tensor, name: str) -> Tensor:
    """[rows, S, H, D] seen as pages [rows * S, 1, H, D] of one key."""
    try:
        return cache.view(-1, 1, *cache.shape[2:])
    except RuntimeError:
        raise ValueError(
            f"{name} has strides {cache.stride()}; with cache_leftpad its sequences must lie one after the other in memory: "
            "allocate it as [batch, seqlen, heads, head_dim]"
        ) from None
