"""What the encoder-decoders share: the way from tokens to logits, and the cache of what the decoder has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from foveate.models.sequences import PackedSequences


class CrossAttention(Protocol):
    """A layer's attention to the source."""

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, H, D] each."""
        ...


class EncoderDecoder(nn.Module):
    """tokens of a source and of a target -> logits. config: has start_id, pad_id and max_positions, None for any length."""

    config: Any
    lm_head: nn.Module

    def encode(
        self, tokens: Tensor, attention_mask: Tensor | None = None, packed: PackedSequences | None = None
    ) -> Tensor:
        """tokens int64 [B, S] -> [B, S, hidden]. attention_mask [B, S]: not 0 where there is text, None for everywhere.

        packed: tokens [1, total] are several sources.
        """
        raise NotImplementedError

    def decode(self, tokens: Tensor, cache: DecoderCache, packed: PackedSequences | None = None) -> Tensor:
        """The next tokens int64 [B * beams, S] of each target -> [B * beams, S, hidden], ready for `logits`.

        packed: tokens [1, total] are the targets of the cache's packed sources.
        """
        raise NotImplementedError

    def cross_attention(self) -> Sequence[CrossAttention]:
        """The cross-attention of each layer of the decoder."""
        raise NotImplementedError

    @property
    def logits_bias(self) -> Tensor | None:
        """[vocab], added to what the head makes of the hidden states."""
        return None

    @property
    def device(self) -> torch.device:
        """The device of a norm's weight, which is never packed."""
        norms = (p for name, p in self.named_parameters() if "norm" in name)
        return next(norms).device

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]"""
        out = self.lm_head(hidden)
        return out if self.logits_bias is None else out + self.logits_bias

    def forward(self, tokens: Tensor, decoder_tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, target length, vocab] of each target token after decoder_tokens (see `shift_right`); differentiable."""
        cache = DecoderCache(self, self.encode(tokens, attention_mask), attention_mask, keep=False)
        return self.logits(self.decode(decoder_tokens, cache))

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels [B, S]: the start token, then all labels but the last; -100 becomes padding."""
        start = labels.new_full((labels.shape[0], 1), self.config.start_id)
        shifted = torch.cat([start, labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, self.config.pad_id)


class DecoderCache:
    """Keys and values of a decoder: those of the source, computed once, and those of the tokens so far.

    cross: for each layer k, v [B, source length, H, D]; mask: [B, 1, 1, source length] or None. The decoder's rows may be beams
    times B. Without `keep`, nothing is kept after a call, which is then a whole decoder pass. packed: the sources' places.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        encoded: Tensor,
        attention_mask: Tensor | None,
        keep: bool = True,
        packed: PackedSequences | None = None,
    ) -> None:
        self.cross = [attention.keys_values(encoded) for attention in model.cross_attention()]
        self.mask = padding_mask(attention_mask)
        self.keep, self.packed = keep, packed
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * len(self.cross)
        self._lengths = [0] * len(self.cross)

    @property
    def length(self) -> int:
        """Tokens of each target that are kept, before a step."""
        return self._lengths[0] if self._lengths else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer so far, [B, length, H, D] each. Storage doubles when it is full."""
        if not self.keep:
            return k, v
        start, length = self._lengths[layer], self._lengths[layer] + k.shape[1]
        kept = self._kept[layer]
        if kept is None or kept[0].shape[1] < length:
            room = max(16, 2 * length)
            grown = tuple(x.new_empty(x.shape[0], room, *x.shape[2:]) for x in (k, v))
            if kept is not None:
                for new, old in zip(grown, kept):
                    new[:, :start] = old[:, :start]
            kept = self._kept[layer] = (grown[0], grown[1])
        kept[0][:, start:length] = k
        kept[1][:, start:length] = v
        self._lengths[layer] = length
        return kept[0][:, :length], kept[1][:, :length]

    def reorder(self, rows: Tensor) -> None:
        """The decoder's row i goes on from what was row rows[i]: beam search. rows must stay with their text."""
        self._kept = [None if kept is None else (kept[0][rows], kept[1][rows]) for kept in self._kept]


def mask_option(mask: Tensor | None) -> dict[str, Tensor]:
    """Packed attention takes no mask at all."""
    return {} if mask is None else {"mask": mask}


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """[B, S], not 0 where there is text -> bool [B, 1, 1, S]."""
    return None if attention_mask is None else attention_mask.bool()[:, None, None, :]
