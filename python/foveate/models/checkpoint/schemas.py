"""What each key of a model's files may hold. The one list that config.json and its neighbours and GGUF headers are checked against.

The limits are far above any model that exists and far below what would take a machine down: a header says sizes in a few bytes.
Missing and null values are the readers' to judge; keys that are not here are not read, or read as they are.
"""

from __future__ import annotations

from foveate.files.checked import Rule, either, flag, integer, list_of, mapping, number, rule, text

_SIZE = integer(1, 2**20)
_LAYERS = integer(1, 4096)
_HEADS = integer(1, 2**16)
_HEAD_DIM = integer(1, 2**14)
_POSITIONS = integer(1, 2**31 - 1)
_WINDOW = integer(0, 2**31 - 1)  # 0: none
_EPSILON = number(0, 1)
_SHARE = number(0, 1)
_POSITIVE = number(1e-6, 1e15)
_ID = integer(-1, 2**31 - 1)  # -1: none, as older files of transformers write it
_IDS = either(_ID, list_of(_ID, 2**16))
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
_DTYPE = text(*_DTYPES, *(f"torch.{name}" for name in _DTYPES))

_FACTORS = list_of(_POSITIVE, 2**14)
_ROPE_KEYS: dict[str, Rule] = {
    "rope_type": text(), "type": text(), "factor": _POSITIVE, "rope_theta": _POSITIVE, "partial_rotary_factor": _SHARE,
    "original_max_position_embeddings": _POSITIONS, "low_freq_factor": _POSITIVE, "high_freq_factor": _POSITIVE,
    "attention_factor": _POSITIVE, "beta_fast": _POSITIVE, "beta_slow": _POSITIVE, "mscale": number(0, 1e3), "alpha": _POSITIVE,
    "mscale_all_dim": number(0, 1e3), "truncate": flag(), "short_factor": _FACTORS, "long_factor": _FACTORS,
}  # fmt: skip
_ROPE = mapping(_ROPE_KEYS | {"full_attention": mapping(_ROPE_KEYS), "sliding_attention": mapping(_ROPE_KEYS)})

# Keys of config.json that a file has whatever its architecture: checked when it is opened.
SPECIAL_IDS = {"eos_token_id": _IDS, "bos_token_id": _IDS, "pad_token_id": _ID, "decoder_start_token_id": _ID}
ANY_CONFIG: dict[str, Rule] = SPECIAL_IDS | {
    "model_type": text(), "architectures": list_of(text(), 64), "quantization_config": mapping(), "compression_config": mapping(),
    "quantization": mapping(),
}  # fmt: skip

# Keys of config.json for the architectures that are known.
CONFIG: dict[str, Rule] = ANY_CONFIG | {
    "dtype": _DTYPE, "torch_dtype": _DTYPE, "vocab_size": integer(1, 2**24),
    "hidden_size": _SIZE, "n_embd": _SIZE, "d_model": _SIZE, "intermediate_size": _SIZE, "n_inner": _SIZE, "d_ff": _SIZE,
    "num_hidden_layers": _LAYERS, "n_layer": _LAYERS, "num_layers": _LAYERS, "num_decoder_layers": _LAYERS,
    "num_attention_heads": _HEADS, "num_key_value_heads": _HEADS, "n_head": _HEADS, "num_heads": _HEADS,
    "head_dim": _HEAD_DIM, "d_kv": _HEAD_DIM,
    "max_position_embeddings": _POSITIONS, "n_positions": _POSITIONS, "n_ctx": _POSITIONS,
    "rms_norm_eps": _EPSILON, "layer_norm_epsilon": _EPSILON, "layer_norm_eps": _EPSILON,
    "rope_theta": _POSITIVE, "rope_scaling": _ROPE, "rope_parameters": _ROPE, "partial_rotary_factor": _SHARE,
    "hidden_act": text(), "hidden_activation": text(), "activation_function": text(), "feed_forward_proj": text(),
    "sliding_window": _WINDOW, "use_sliding_window": flag(), "max_window_layers": integer(0, 2**16), "layer_types": list_of(text(), 4096),
    "tie_word_embeddings": flag(), "attention_bias": flag(), "mlp_bias": flag(), "scale_attn_weights": flag(),
    "scale_attn_by_inverse_layer_idx": flag(), "add_cross_attention": flag(), "is_decoder": flag(), "scale_decoder_outputs": flag(),
    "query_pre_attn_scalar": _POSITIVE, "attn_logit_softcapping": _POSITIVE, "final_logit_softcapping": _POSITIVE,
    "attention_dropout": _SHARE, "embd_pdrop": _SHARE, "resid_pdrop": _SHARE, "attn_pdrop": _SHARE, "hidden_dropout_prob": _SHARE,
    "attention_probs_dropout_prob": _SHARE, "classifier_dropout": _SHARE, "dropout_rate": _SHARE,
    "type_vocab_size": integer(0, 2**16), "num_labels": integer(1, 2**20), "id2label": mapping(), "label2id": mapping(),
    "problem_type": text(), "position_embedding_type": text(),
    "original_max_position_embeddings": _POSITIONS, "rope_local_base_freq": _POSITIVE, "rotary_pct": _SHARE, "rotary_emb_base": _POSITIVE,
    "norm_epsilon": _EPSILON, "norm_eps": _EPSILON, "sliding_window_pattern": integer(1, 4096), "use_bidirectional_attention": flag(),
    "num_experts": integer(0, 2**16), "num_local_experts": integer(1, 2**16), "num_experts_per_tok": integer(1, 2**16),
    "moe_intermediate_size": _SIZE, "shared_expert_intermediate_size": _SIZE, "decoder_sparse_step": integer(1, 4096),
    "mlp_only_layers": list_of(integer(0, 4096), 4096), "norm_topk_prob": flag(), "swiglu_limit": _POSITIVE, "clip_qkv": _POSITIVE,
    "kv_lora_rank": _HEAD_DIM, "q_lora_rank": _SIZE, "qk_rope_head_dim": _HEAD_DIM, "qk_nope_head_dim": _HEAD_DIM, "v_head_dim": _HEAD_DIM,
    "n_routed_experts": integer(0, 2**16), "n_shared_experts": integer(0, 2**10), "first_k_dense_replace": integer(0, 4096),
    "n_group": integer(1, 2**16), "topk_group": integer(1, 2**16), "topk_method": text(), "routed_scaling_factor": number(-1e6, 1e6),
    "rope_interleave": flag(), "num_nextn_predict_layers": integer(0, 4096),
    "attention_multiplier": number(-1e6, 1e6), "embedding_multiplier": number(-1e6, 1e6), "residual_multiplier": number(-1e6, 1e6),
    "logits_scaling": number(-1e6, 1e6), "logit_scale": number(-1e6, 1e6), "no_rope_layers": list_of(either(flag(), integer(0, 1)), 4096),
    "no_rope_layer_interval": integer(1, 4096), "use_qk_norm": flag(), "qk_layernorm": flag(), "use_qkv_bias": flag(),
    "use_parallel_residual": flag(), "use_bias": flag(), "attention_out_bias": flag(),
    "global_attn_every_n_layers": integer(1, 4096), "local_attention": integer(0, 2**31 - 1), "global_rope_theta": _POSITIVE,
    "local_rope_theta": _POSITIVE, "norm_bias": flag(), "classifier_bias": flag(), "decoder_bias": flag(), "classifier_pooling": text(),
    "classifier_activation": text(),
    "attention_types": list_of(list_of(either(list_of(text(), 64), integer(0, 4096)), 2), 64), "attention_layers": list_of(text(), 4096),
    "window_size": _SIZE,
    "ffn_dim": _SIZE, "word_embed_proj_dim": _SIZE, "do_layer_norm_before": flag(), "enable_bias": flag(), "n_embed": _SIZE,
    "seq_length": _POSITIONS, "max_seq_len": _POSITIONS, "rotary_dim": integer(0, 2**14), "ffn_hidden_size": _SIZE, "num_kv_heads": _HEADS,
    "alibi": flag(), "new_decoder_architecture": flag(), "multi_query": flag(), "parallel_attn": flag(), "bias": flag(),
    "num_ln_in_parallel_attn": integer(1, 2), "no_bias": flag(), "apply_residual_connection_post_layernorm": flag(),
    "attn_config": mapping({"alibi": flag(), "qk_ln": flag(), "clip_qkv": _POSITIVE, "softmax_scale": _POSITIVE}),
    "dim": _SIZE, "hidden_dim": _SIZE, "n_layers": _LAYERS, "n_heads": _HEADS, "activation": text(), "embedding_size": _SIZE,
    "num_hidden_groups": _LAYERS, "inner_group_num": _LAYERS, "dropout": _SHARE, "seq_classif_dropout": _SHARE, "qa_dropout": _SHARE,
    "classifier_dropout_prob": _SHARE,
    "rotary_emb_fraction": _SHARE, "rotary_emb_interleaved": flag(), "rotary_scaling_factor": _POSITIVE,
    "moe_every_n_layers": integer(0, 4096),
    "prenorm": flag(), "parallel_block": flag(), "causal": flag(), "use_rms_norm": flag(), "qkv_proj_bias": flag(), "mlp_fc1_bias": flag(),
    "mlp_fc2_bias": flag(),
    "relative_attention": flag(), "max_relative_positions": integer(-1, 2**20), "position_buckets": integer(-1, 2**20),
    "position_biased_input": flag(), "pos_att_type": either(text(), list_of(text(), 16)), "share_att_key": flag(), "norm_rel_ebd": text(),
    "conv_kernel_size": integer(0, 2**10), "conv_groups": _HEADS, "conv_act": text(), "pooler_dropout": _SHARE, "pooler_hidden_act": text(),
    "pooler_hidden_size": _SIZE, "cls_dropout": _SHARE, "legacy": flag(), "attention_head_size": _HEAD_DIM, "talking_head": flag(),
    "relative_attention_num_buckets": integer(2, 2**16), "relative_attention_max_distance": integer(2, 2**31 - 1),
    "encoder_layers": _LAYERS, "decoder_layers": _LAYERS, "encoder_attention_heads": _HEADS, "decoder_attention_heads": _HEADS,
    "encoder_ffn_dim": _SIZE, "decoder_ffn_dim": _SIZE, "scale_embedding": flag(), "activation_dropout": _SHARE,
    "share_encoder_decoder_embeddings": flag(), "decoder_vocab_size": integer(1, 2**24),
    "local_radius": integer(1, 2**31 - 1), "encoder_attention_type": text(), "task_specific_params": mapping(),
}  # fmt: skip

_WORD = list_of(integer(0, 2**31 - 1), 2**16)
_WHOLE = rule(
    "a whole number", lambda v: isinstance(v, float) and v.is_integer() and -1 <= v < 2**31
)  # 50.0, as some files have it
GENERATION: dict[str, Rule] = SPECIAL_IDS | {
    "temperature": number(0, 1e6), "top_p": number(0, 1), "top_k": either(integer(-1, 2**31 - 1), _WHOLE), "min_p": number(0, 1),
    "repetition_penalty": number(1e-6, 1e6), "max_new_tokens": integer(1, 2**31 - 1), "do_sample": flag(),
    "num_beams": integer(1, 2**16), "length_penalty": number(-100, 100),
    "forced_bos_token_id": _IDS, "forced_eos_token_id": _IDS, "suppress_tokens": list_of(_ID, 2**16),
    "bad_words_ids": list_of(_WORD, 2**16),
    "max_length": integer(0, 2**31 - 1), "min_length": integer(0, 2**31 - 1), "min_new_tokens": integer(0, 2**31 - 1),
    "no_repeat_ngram_size": integer(0, 2**16), "encoder_no_repeat_ngram_size": integer(0, 2**16), "renormalize_logits": flag(),
    "num_return_sequences": integer(1, 2**16), "early_stopping": either(flag(), text("never")),
}  # fmt: skip

_TOKEN = either(text(), mapping({"content": text()}, required=("content",)))
_EXTRA = either(list_of(_TOKEN, 2**16), mapping())
SPECIAL_TOKENS: dict[str, Rule] = {
    f"{name}_token": _TOKEN for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
} | {"additional_special_tokens": _EXTRA, "extra_special_tokens": _EXTRA}  # fmt: skip


def _is_id(key: object) -> bool:
    return isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10


def _is_added(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


_ADDED = rule(
    "an object of ids and tokens",
    lambda v: isinstance(v, dict) and all(_is_id(key) and _is_added(token) for key, token in v.items()),
)
TOKENIZER: dict[str, Rule] = SPECIAL_TOKENS | {
    "added_tokens_decoder": _ADDED, "tokenizer_class": text(),
    "chat_template": either(text(), list_of(mapping({"name": text(), "template": text()}, ("name", "template")), 256)),
    "src_lang": text(), "tgt_lang": text(), "legacy_behaviour": flag(), "separate_vocabs": flag(), "language_codes": text(),
    "do_lower_case": flag(), "split_by_punct": flag(), "strip_accents": flag(), "tokenize_chinese_chars": flag(),
}  # fmt: skip


def _shard(name: str) -> bool:
    """The index is beside the shards, so a name that leads elsewhere is not one of this model's files."""
    parts = name.replace("\\", "/").split("/")
    return bool(name) and "\0" not in name and not name.startswith("/") and ".." not in parts and ":" not in name


_SHARD = rule("the name of a file in this folder", lambda v: isinstance(v, str) and _shard(v))
INDEX: dict[str, Rule] = {
    "weight_map": Rule(
        "an object of tensors and their files",
        lambda v: next(
            ((f"[{name!r}]", file, _SHARD.allowed) for name, file in v.items() if _SHARD.wrong(file)), None
        ) if isinstance(v, dict) else ("", v, "an object of tensors and their files"),
    )
}  # fmt: skip

# peft's adapter_config.json
ADAPTER: dict[str, Rule] = {
    "peft_type": text(), "base_model_name_or_path": text(), "r": integer(1, 2**16), "lora_alpha": number(-1e9, 1e9),
    "lora_dropout": _SHARE, "use_rslora": flag(), "target_modules": either(text(), list_of(text(), 2**16)),
}  # fmt: skip

# A GGUF file's metadata, by the whole key and, of the architecture's own, by what follows its name.
_UNICODE = rule("a text", lambda v: (isinstance(v, str) and v.isascii()) or (isinstance(v, str) and _encodes(v)))
_TOKENS = list_of(_UNICODE, 2**24)
_TOKEN_ID = integer(0, 2**31 - 1)
GGUF: dict[str, Rule] = {
    "general.architecture": text(), "general.alignment": integer(8, 2**16),
    "split.no": integer(0, 2**16), "split.count": integer(0, 2**16), "split.tensors.count": integer(0, 2**31 - 1),
    "tokenizer.ggml.model": text(), "tokenizer.ggml.pre": text(), "tokenizer.ggml.tokens": _TOKENS, "tokenizer.ggml.merges": _TOKENS,
    "tokenizer.ggml.scores": list_of(number(-1e30, 1e30)), "tokenizer.ggml.token_type": list_of(integer(0, 255)),
    "tokenizer.chat_template": _UNICODE,
} | {
    f"tokenizer.ggml.{name}_token_id": _TOKEN_ID for name in ("bos", "eos", "eot", "eom", "unknown", "padding", "cls", "seperator", "mask")
} | {
    f"tokenizer.ggml.{name}": flag() for name in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")
} | {"tokenizer.ggml.precompiled_charsmap": list_of(integer(0, 255), 2**24)}  # fmt: skip
GGUF_MODEL: dict[str, Rule] = {
    "context_length": _POSITIONS, "embedding_length": _SIZE, "block_count": _LAYERS, "feed_forward_length": _SIZE,
    "attention.head_count": _HEADS, "attention.head_count_kv": _HEADS, "attention.key_length": _HEAD_DIM,
    "attention.value_length": _HEAD_DIM, "attention.layer_norm_rms_epsilon": _EPSILON, "attention.layer_norm_epsilon": _EPSILON,
    "attention.sliding_window": _WINDOW, "rope.freq_base": _POSITIVE, "rope.scaling.type": text(), "rope.scaling.factor": _POSITIVE,
    "rope.scale_linear": _POSITIVE, "rope.dimension_count": _HEAD_DIM, "rope.scaling.original_context_length": _POSITIONS,
    "pooling_type": integer(0, 4), "attention.causal": flag(),
    "attn_logit_softcapping": _POSITIVE, "final_logit_softcapping": _POSITIVE, "expert_count": integer(0, 2**16),
    "expert_used_count": integer(1, 2**16), "expert_feed_forward_length": _SIZE, "expert_shared_feed_forward_length": _SIZE,
    "rope.freq_base_swa": _POSITIVE, "rope.scaling.attn_factor": _POSITIVE, "attention.scale": number(-1e6, 1e6),
    "embedding_scale": number(-1e6, 1e6), "residual_scale": number(-1e6, 1e6), "logit_scale": number(-1e6, 1e6),
}  # fmt: skip


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
