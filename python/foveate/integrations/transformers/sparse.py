"""Masks of sparse attention: which keys a model's indexer chose for each query."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_of_indices(indices: Tensor, Skv: int) -> Tensor:
    """bool [B, 1, Sq, Skv], True at the keys `indices` [B, Sq, chosen] names; negative entries name none."""
    if indices.dim() != 3 or indices.is_floating_point():
        raise ValueError(
            f"indices has dtype {indices.dtype} and shape {list(indices.shape)}; it takes integers [B, Sq, chosen keys]"
        )
    return _scatter(indices, Skv)[:, None]


def mask_of_blocks(block_indices: Tensor, block_size: int, Hq: int, Skv: int) -> Tensor:
    """bool [B, Hq, Sq, Skv], True in the blocks of keys that `block_indices` [B, groups, Sq, chosen] names, for each group of heads."""
    if block_indices.dim() != 4 or block_indices.is_floating_point() or Hq % block_indices.shape[1]:
        raise ValueError(
            f"block_indices has dtype {block_indices.dtype} and shape {list(block_indices.shape)}; it takes integers "
            f"[B, groups, Sq, chosen blocks], where the groups divide {Hq} heads"
        )
    blocks = _scatter(block_indices, -(-Skv // block_size))
    keys = blocks.repeat_interleave(block_size, -1)[..., :Skv]
    return keys.repeat_interleave(Hq // block_indices.shape[1], 1)


def _scatter(indices: Tensor, size: int) -> Tensor:
    chosen = torch.where(indices < 0, size, indices).long()
    mask = torch.zeros(*indices.shape[:-1], size + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, chosen, True)[..., :size]
