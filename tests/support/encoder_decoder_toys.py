"""Small encoder-decoders of every family: transformers' model with random weights, for those of ours that are read from its folder."""

from __future__ import annotations

import warnings
from typing import Any

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

from foveate.models.encoder_decoder_families import FAMILIES
from model_cases import randomize

VOCAB, PAD, EOS, START = 24, 0, 1, 2
_T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "dropout_rate": 0.0,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 60, "bos_token_id": 3,
    "forced_eos_token_id": None, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}  # fmt: skip
# model_type and what is switched on, so that every branch of a family runs.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bart": ("bart", {}),
    "bart, scaled": ("bart", {"scale_embedding": True, "activation_function": "relu"}),
    "plbart": ("plbart", {}),
    "mbart": ("mbart", {"scale_embedding": True}),
    "pegasus": ("pegasus", {"scale_embedding": True, "activation_function": "relu"}),
    "marian": ("marian", {"scale_embedding": True, "activation_function": "swish"}),
    "marian, two vocabularies": ("marian", {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 22}),
    "m2m_100": ("m2m_100", {}),
    "blenderbot": ("blenderbot", {}),
    "blenderbot-small": ("blenderbot-small", {}),
    "umt5": ("umt5", {}),
    "longt5": ("longt5", {"local_radius": 3}),
    "longt5, 1.1": ("longt5", {"local_radius": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5": ("t5", {}),
    "mt5": ("mt5", {"feed_forward_proj": "gated-gelu"}),
}


def theirs(case: str, seed: int = 0, std: float = 0.3, **changes: Any) -> Any:
    """transformers' model in eval mode, every weight random but the tables that it computes."""
    torch.manual_seed(seed)
    model_type, own = CASES[case]
    sizes = _BART if model_type in FAMILIES else _T5
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": START}
    settings = {**sizes, **ids, **own, **changes}
    config = transformers.AutoConfig.for_model(model_type, **settings, attn_implementation="eager")
    model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    computed = {
        name: p.clone() for name, p in model.named_parameters() if "embed_positions" in name and not p.requires_grad
    }
    randomize(model, std)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in computed:
                p.copy_(computed[name])
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    model.tie_weights()
    return model.eval()
