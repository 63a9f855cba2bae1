"""A decoder of decoder_families.py that classifies texts by its last token: reward models, rerankers, classifiers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from foveate.models.decoder_config import LlamaConfig
from foveate.models.llama import Llama
from foveate.models.sequences import PackedSequences


@dataclass(frozen=True)
class DecoderClassifierConfig(LlamaConfig):
    num_labels: int = 2

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> DecoderClassifierConfig:
        labels = len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2)
        return cls(**vars(LlamaConfig.from_hf(config)), num_labels=labels)


class LlamaForSequenceClassification(Llama):
    """`score`, a linear layer without a bias, of the hidden state of each text's last token; the names are Hugging Face's."""

    config_class = DecoderClassifierConfig
    # with those of Llama the language model's head, in checkpoints that a classifier's head is put on
    ignored = re.compile(rf"{Llama.ignored.pattern}|lm_head\.(weight|bias)")

    def __init__(self, config: DecoderClassifierConfig) -> None:
        super().__init__(config)
        self.lm_head, self.tied = None, {}
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)

    def forward(  # type: ignore[override]
        self, tokens: Tensor, token_type_ids: Tensor | None = None, *, packed: PackedSequences | None = None
    ) -> Tensor:
        """tokens int64 [B, S], or with packed [1, total] of several texts -> logits [texts, num_labels].

        A decoder has no token types: token_type_ids, which tokenizers of pairs give, are not read. Padding must not follow a text.
        """
        hidden = self.hidden(tokens, packed=packed)
        last = hidden[:, -1] if packed is None else hidden[0, packed.cu_seqlens[1:].long() - 1]
        return self.score(last)
