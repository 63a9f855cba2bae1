"""Small configs of any transformers config class: its own fields, with small numbers where their names say what they count."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

# The first pattern that matches the whole name of a field decides. Fields of other names keep their default.
SIZES: list[tuple[str, Any]] = [
    (r"(text_|language_)?vocab_size", 99),
    (r"type_vocab_size", 2),
    (r"(num_hidden_layers|n_layers?|num_layers|layers|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers|depth)", 2),
    (r"(num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads|attention_heads|n_head|heads|"
     r"encoder_num_attention_heads|decoder_num_attention_heads|d_heads|encoder_num_heads|decoder_num_heads)", 4),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|decoder_num_key_value_heads|encoder_num_key_value_heads)", 2),
    (r"(head_dim|d_kv|attention_head_dim|head_size|kv_channels|global_head_dim|swa_head_dim)", 16),
    (r"qk_rope_head_dim", 8), (r"qk_nope_head_dim", 16), (r"qk_head_dim", 24), (r"v_head_dim", 12),
    (r"(kv_lora_rank|q_lora_rank|lora_rank|o_lora_rank)", 16),
    (r"(hidden_size|d_model|n_embd|embed_dim|dim|width|embedding_size|hidden_dim|model_dim|word_embed_proj_dim|descriptor_dim|"
     r"encoder_hidden_size|decoder_hidden_size|embed_dims|text_hidden_size|out_hidden_size)", 64),
    (r"(projection_dim|projector_hidden_size|audio_hidden_size)", 64),
    (r"(intermediate_size|d_ff|ffn_dim|n_inner|encoder_ffn_dim|decoder_ffn_dim|mlp_dim|ffn_hidden_size|intermediate_size_mlp|"
     r"dense_intermediate_size|encoder_intermediate_size|decoder_intermediate_size|feed_forward_size|dim_feedforward)", 96),
    (r"(moe_intermediate_size|expert_intermediate_size|shared_expert_intermediate_size|moe_shared_expert_intermediate_size)", 32),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_2d_position_embeddings|max_target_positions|"
     r"max_length|model_max_length|original_max_position_embeddings|seq_length|context_length)", 64),
    (r"max_source_positions", 32),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|moe_k|top_k_experts|num_experts_per_token|moe_topk)", 2),
    (r"(n_group|topk_group)", 1),
    (r"(sliding_window|attention_window_size|local_attention)", 6),
    (r"attention_chunk_size", 8),
    (r"query_pre_attn_scalar", 16),
    (r"image_size", 32), (r"patch_size", 8), (r"temporal_patch_size", 2), (r"spatial_merge_size", 2), (r"num_channels", 3),
    (r"(num_mel_bins|feature_size|n_mels)", 16),
    (r"(index_topk)", 4), (r"index_n_heads", 2), (r"index_head_dim", 32),
    (r"relative_attention_num_buckets", 8), (r"relative_attention_max_distance", 12),
    (r"pad_token_id", 0), (r"bos_token_id", 1), (r"eos_token_id", 2), (r"decoder_start_token_id", 1),
    (r"forced_.*_token_id", None), (r"(suppress_tokens|begin_suppress_tokens)", None),
    (r"experts_implementation", "eager"),
    (r"(layerdrop|encoder_layerdrop|decoder_layerdrop|mask_time_prob|mask_feature_prob)", 0.0),
    (r".*dropout.*|.*_pdrop|drop_path_rate", 0.0),
]  # fmt: skip
_RULES = [(re.compile(pattern), value) for pattern, value in SIZES]
_TOKEN = re.compile(r".*_token_(id|index)|.*_token")
HEADS = re.compile(r".*(heads|head|n_head)$")


def tiny(config_class: type, **given: Any) -> Any:
    """A config of `config_class` with small sizes; its parts likewise."""
    default = config_class()
    settings: dict[str, Any] = {}
    special = 98
    for name in _fields(config_class):
        value = _value(default, name)
        if name in getattr(config_class, "sub_configs", {}):
            part = type(value) if value is not None else None
            if part is None:  # optional: absent by default, and absent here
                continue
            if hasattr(part, "sub_configs"):
                settings[name] = tiny(part)
            continue
        rule = next(((pattern, small) for pattern, small in _RULES if pattern.fullmatch(name)), None)
        if rule is not None:
            if (value is not None and not isinstance(value, (list, tuple, dict))) or rule[1] is None:
                settings[name] = rule[1] if not isinstance(value, bool) else value
        elif _TOKEN.fullmatch(name) and isinstance(value, int) and value >= 90:
            settings[name] = special
            special -= 1
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            settings[name] = _rope(value)
    if (
        "kv_lora_rank" in settings
    ):  # multi-head latent attention: every head has its own keys, of the rotated head dim here
        latent = {"num_key_value_heads": 4, "head_dim": settings.get("qk_rope_head_dim", 8)}
        settings |= {name: value for name, value in latent.items() if name in _fields(config_class)}
    settings.update(given)
    if getattr(default, "attribute_map", None):
        settings = {
            k: v
            for k, v in settings.items()
            if k not in default.attribute_map or default.attribute_map[k] not in settings
        }
    _layer_lists(default, settings)
    return config_class(**settings)


def _value(config: Any, name: str) -> Any:
    """The value of one layer where it differs between layers."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers refuses to name one value where the layers have several
        return None


def _fields(config_class: type) -> list[str]:
    ignored = {"transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type"}
    return [f.name for f in dataclasses.fields(config_class) if f.name not in ignored]


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    if "mrope_section" in value:
        return {**value, "mrope_section": [2, 3, 3]}
    return value


def _layer_lists(default: Any, settings: dict[str, Any]) -> None:
    """Lists with an entry for each layer are cut to as many layers, one of each kind first."""
    count = getattr(default, "num_hidden_layers", None)
    if not isinstance(count, int) or "num_hidden_layers" not in settings:
        return
    for name in _fields(type(default)):
        value = _value(default, name)
        if name in settings or not isinstance(value, (list, tuple)) or len(value) != count or count <= 4:
            continue
        if all(isinstance(x, str) for x in value):
            kinds = list(dict.fromkeys(value))
            settings[name] = (kinds + [kinds[0]])[:4] if len(kinds) > 1 else kinds * 2
            settings["num_hidden_layers"] = max(settings["num_hidden_layers"], len(settings[name]))
    for name, value in settings.items():
        if isinstance(value, list) and value and isinstance(value[0], str) and name.endswith("_types"):
            settings[name] = (value * 4)[: settings["num_hidden_layers"]]
    for name in _fields(type(default)):
        value = _value(default, name)
        if name not in settings and isinstance(value, (list, tuple)) and len(value) == count:
            settings[name] = list(value[: settings["num_hidden_layers"]])
