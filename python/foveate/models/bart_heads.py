"""Heads of BART that read a text instead of writing one: classes of the text, and the ends of an answer in it."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from foveate.models.bart import BartConfig, BartWithoutHead
from foveate.models.encoder_decoder import DecoderCache
from foveate.models.sequences import PackedSequences


class BartReader(BartWithoutHead):
    """The decoder reads the text again behind its start token, and sees the encoder's; called as `bert.Bert`, without token types."""

    ignored = re.compile(rf"{BartWithoutHead.ignored.pattern}|final_logits_bias|lm_head\.weight")

    def hidden(
        self, tokens: Tensor, attention_mask: Tensor | None, kv_lens: Tensor | None, packed: PackedSequences | None
    ) -> Tensor:
        """The decoder's states at each token, [B, S, hidden]. ValueError for padding beside packed sequences."""
        if kv_lens is not None:
            inside = torch.arange(tokens.shape[1], device=tokens.device) < kv_lens[:, None]
            attention_mask = inside if attention_mask is None else inside & attention_mask.bool()
        if packed is not None and attention_mask is not None:
            raise ValueError("packed sequences have no padding; omit attention_mask and kv_lens")
        encoded = self.encode(tokens, attention_mask, packed)
        cache = DecoderCache(self, encoded, attention_mask, keep=False, packed=packed)
        return self.decode(self._shifted(tokens, packed), cache, packed)

    def _shifted(self, tokens: Tensor, packed: PackedSequences | None) -> Tensor:
        if packed is None:
            return self.shift_right(tokens)
        shifted = tokens.roll(1, 1)
        ends = packed.cu_seqlens[1:].long() - 1
        shifted[0, packed.starts] = tokens[0, ends] if self.config.family.wraps_labels else self.config.start_id
        return shifted


class BartForSequenceClassification(BartReader):
    """Classes by the state at the last end-of-text token."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.classification_head = nn.ModuleDict(
            {"dense": nn.Linear(size, size), "out_proj": nn.Linear(size, config.num_labels)}
        )
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(
        self,
        tokens: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_lens: Tensor | None = None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """Logits [B, num_labels], B being the sequences if they are packed. ValueError for a text without the end-of-text token."""
        hidden = self.hidden(tokens, attention_mask, kv_lens, packed)
        read = hidden[self._ends(tokens, packed)]
        inner = torch.tanh(self.classification_head["dense"](self.dropout(read)))
        return self.classification_head["out_proj"](self.dropout(inner))

    def _ends(self, tokens: Tensor, packed: PackedSequences | None) -> tuple[Tensor, Tensor]:
        """Row and place of each sequence's last end-of-text token."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        found = torch.where(tokens == self.config.eos_id, places, -1)
        if packed is None:
            last = found.amax(1)
            rows, absent = torch.arange(len(tokens), device=tokens.device), last < 0
        else:
            lengths = packed.cu_seqlens.diff().long()
            sequence = torch.repeat_interleave(torch.arange(len(lengths), device=tokens.device), lengths)
            last = found.new_full((len(lengths),), -1).scatter_reduce(0, sequence, found[0], "amax")
            rows, absent = torch.zeros_like(last), last < packed.starts
        if bool(absent.any()):
            raise ValueError(
                f"{int(absent.sum())} of {len(last)} texts have no token {self.config.eos_id}, the eos_token_id, by which BART reads a "
                "text; take the tokenizer of this checkpoint, which adds it"
            )
        return rows, last


class BartForQuestionAnswering(BartReader):
    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_lens: Tensor | None = None,
        packed: PackedSequences | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits of an answer's start and end at each token, [B, S] each."""
        start, end = self.qa_outputs(self.hidden(tokens, attention_mask, kv_lens, packed)).unbind(-1)
        return start, end


HEADS: dict[str, type[nn.Module]] = {
    "sequence-classification": BartForSequenceClassification,
    "question-answering": BartForQuestionAnswering,
}
