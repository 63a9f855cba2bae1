"""The encoder-decoders of BART's kind, each once: how a checkpoint of it differs from BART in its config.

All run through `bart.Bart`, which has the names of their weights too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Config = Mapping[str, Any]
# Learned ones, those of Vaswani et al. 2017, or these counted from the padding id on, as M2M-100 does it.
Positions = Literal["learned", "sinusoidal", "sinusoidal after padding"]


@dataclass(frozen=True)
class EncoderDecoderFamily:
    """name: transformers' class with the language-model head. defaults: what keys of config.json are where a file leaves them out.

    position_offset: rows of the table of learned positions before the first. pre_norm: norms before the blocks, and one after the last.
    embedding_norm: of the embeddings; "before positions": in the decoder without the positions. logits_bias: final_logits_bias.
    wraps_labels: in training the decoder begins with the last token of the labels, the language, not with a start token.
    trains: whether the seq2seq objective is for it; not where texts must be given with their languages.
    """

    name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    positions: Positions = "learned"
    position_offset: int = 0
    pre_norm: bool = False
    embedding_norm: Literal["", "all", "before positions"] = ""
    logits_bias: bool = True
    wraps_labels: bool = False
    trains: bool = True


_DEFAULTS: Config = {
    "activation_function": "gelu", "scale_embedding": False, "dropout": 0.1, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "max_position_embeddings": 1024, "tie_word_embeddings": True, "share_encoder_decoder_embeddings": True,
}  # fmt: skip

FAMILIES: dict[str, EncoderDecoderFamily] = {
    "bart": EncoderDecoderFamily(
        "BartForConditionalGeneration",
        {**_DEFAULTS, "pad_token_id": 1, "decoder_start_token_id": 2},
        position_offset=2, embedding_norm="all",
    ),
    "plbart": EncoderDecoderFamily(
        "PLBartForConditionalGeneration",
        {**_DEFAULTS, "pad_token_id": 1, "scale_embedding": True, "attention_dropout": 0.1},
        position_offset=2, embedding_norm="all", wraps_labels=True, trains=False,
    ),
    "mbart": EncoderDecoderFamily(
        "MBartForConditionalGeneration",
        {**_DEFAULTS, "pad_token_id": 1},
        position_offset=2, pre_norm=True, embedding_norm="all", wraps_labels=True, trains=False,
    ),
    "pegasus": EncoderDecoderFamily(
        "PegasusForConditionalGeneration",
        {**_DEFAULTS, "pad_token_id": 0, "decoder_start_token_id": 0},
        positions="sinusoidal", pre_norm=True,
    ),
    "marian": EncoderDecoderFamily(
        "MarianMTModel",
        {**_DEFAULTS, "pad_token_id": 58100, "decoder_start_token_id": 58100},
        positions="sinusoidal",
    ),
    "m2m_100": EncoderDecoderFamily(
        "M2M100ForConditionalGeneration",
        {
            **_DEFAULTS, "activation_function": "relu", "scale_embedding": True, "attention_dropout": 0.1, "pad_token_id": 1,
            "decoder_start_token_id": 2,
        },
        positions="sinusoidal after padding", pre_norm=True, logits_bias=False, trains=False,
    ),
    "blenderbot": EncoderDecoderFamily(
        "BlenderbotForConditionalGeneration",
        {**_DEFAULTS, "max_position_embeddings": 128, "pad_token_id": 0, "decoder_start_token_id": 1},
        pre_norm=True,
    ),
    "blenderbot-small": EncoderDecoderFamily(
        "BlenderbotSmallForConditionalGeneration",
        {**_DEFAULTS, "max_position_embeddings": 512, "pad_token_id": 0, "decoder_start_token_id": 1},
        embedding_norm="before positions",
    ),
}  # fmt: skip
