"""Padded batch to packed sequences and back: what flash_attn.bert_padding offers, under its names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a padding mask keeps, one after the other.

    hidden_states [B, S, ...]; attention_mask [B, S], 1 or True = a token; unused_mask [B, S]: 1 for tokens that keep their place in
    the packed form without being used. Returns (packed [total, ...], indices [total] into B * S, cu_seqlens [B + 1] int32,
    max_seqlen, seqused [B] int32: the tokens of attention_mask alone). Differentiable; reads max_seqlen back to the host.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen = int(lengths.max()) if lengths.numel() else 0
    used = attention_mask.sum(-1, dtype=torch.int32)
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, max_seqlen, used


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed [total, ...] back to [batch, seqlen, ...], zeros where no token was. Differentiable."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))
