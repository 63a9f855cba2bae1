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
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices] along the first dimension. Differentiable."""
    return x[indices]


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """zeros [first_axis_dim, ...] with values at indices. Differentiable."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_put((indices,), values)


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """(x[indices], x): for a residual connection that starts at x."""
    return x[indices], x


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a batch whose rows hold several short sequences each, one after the other.

    hidden_states [B, S, ...]; attention_mask_in_length [B, S]: the lengths of the sequences of a row, then zeros, such as
    [3, 2, 0, 0, 0, 0] for tokens 0-2 and 3-4. Returns (packed [total, ...], indices [total] into B * S, cu_seqlens int32, max_seqlen).
    Differentiable; reads max_seqlen back to the host.
    """
    S = attention_mask_in_length.shape[-1]
    used = attention_mask_in_length.sum(-1, keepdim=True)
    indices = (torch.arange(S, device=used.device) < used).flatten().nonzero().flatten()
    lengths = attention_mask_in_length[attention_mask_in_length > 0]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return hidden_states.flatten(0, 1)[indices], indices, cu_seqlens, longest
