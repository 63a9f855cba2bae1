"""What families older than Llama, or unlike it, set of LlamaConfig; decoder_families.py lists them."""

from __future__ import annotations

from typing import Any

from foveate.files.checked import CheckpointError


def opt(config: dict[str, Any]) -> dict[str, Any]:
    hidden = config["hidden_size"]
    if not config.get("do_layer_norm_before", True) or config.get("word_embed_proj_dim", hidden) != hidden:
        raise CheckpointError(
            "OPT with norms after the blocks or projected embeddings (OPT 350M) is not supported; the other sizes are"
        )
    bias = bool(config.get("enable_bias", True))
    return {
        "norm": "layer_bias", "norm_eps": 1e-5, "gated": False, "qkv_bias": bias, "o_bias": bias, "mlp_bias": bias,
        "activation": config.get("activation_function", "relu"), "learned_positions": 2, "num_kv_heads": config["num_attention_heads"],
    }  # fmt: skip


def bloom(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("apply_residual_connection_post_layernorm"):
        raise CheckpointError(
            "apply_residual_connection_post_layernorm is not supported for bloom; the published models are without"
        )
    return {
        "norm": "layer_bias", "norm_eps": config.get("layer_norm_epsilon", 1e-5), "embed_norm": True, "gated": False, "alibi": True,
        "qkv_bias": True, "o_bias": True, "mlp_bias": True, "activation": "gelu_new",
    }  # fmt: skip


def mpt(config: dict[str, Any]) -> dict[str, Any]:
    attention = config.get("attn_config") or {}
    if not attention.get("alibi", True) or attention.get("qk_ln") or not config.get("no_bias", True):
        raise CheckpointError("MPT without ALiBi, with qk_ln or with biases is not supported; MPT 7B and 30B are")
    return {
        "norm": "layer", "norm_eps": config.get("layer_norm_epsilon", 1e-5), "gated": False, "alibi": True, "activation": "gelu",
        "clip_qkv": attention.get("clip_qkv"), "scale": attention.get("softmax_scale"),
    }  # fmt: skip


def gptj(config: dict[str, Any]) -> dict[str, Any]:
    rotary = config.get("rotary_dim") or config["head_dim"]
    if rotary % 2 or rotary > config["head_dim"]:
        raise CheckpointError(f"rotary_dim={rotary} must be even and at most the head dim of {config['head_dim']}")
    return {
        "norm": "layer_bias", "norm_eps": config.get("layer_norm_epsilon", 1e-5), "gated": False, "parallel": "one", "mlp_bias": True,
        "head_bias": True, "rope_interleaved": True, "rotary_dim": rotary, "activation": config.get("activation_function", "gelu_new"),
    }  # fmt: skip


def gpt_neo(config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    kinds = config.get("attention_layers")
    if kinds is None:  # [[["global", "local"], 12]]: these two, twelve times
        kinds = []
        for entry in config.get("attention_types") or ():
            if len(entry) != 2 or not isinstance(entry[0], list) or not isinstance(entry[1], int):
                raise CheckpointError(
                    f"attention_types has {entry}, which is not a list of kinds and how often they come"
                )
            kinds += entry[0] * entry[1]
    if len(kinds) != layers or set(kinds) - {"global", "local"}:
        raise CheckpointError(
            f"attention_types make {len(kinds)} layers of {sorted(set(kinds))}; this model has {layers}"
        )
    window = config.get("window_size") or 256
    return {
        "norm": "layer_bias", "norm_eps": config.get("layer_norm_epsilon", 1e-5), "gated": False, "o_bias": True, "mlp_bias": True,
        "scale": 1.0, "learned_positions": 0, "activation": config.get("activation_function", "gelu_new"),
        "windows": tuple(window if kind == "local" else None for kind in kinds),
    }  # fmt: skip


def falcon(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("alibi"):
        raise CheckpointError(
            "Falcon with ALiBi (falcon-rw) is not supported; Falcon 7B, 40B and 180B, which have RoPE, are"
        )
    new, heads = bool(config.get("new_decoder_architecture")), config["num_attention_heads"]
    kv = (config.get("num_kv_heads") or heads) if new else 1 if config.get("multi_query", True) else heads
    norms = config.get("num_ln_in_parallel_attn") or (2 if new else 1)
    parallel = config.get("parallel_attn", True)
    bias = bool(config.get("bias"))
    return {
        "norm": "layer_bias", "norm_eps": config.get("layer_norm_epsilon", 1e-5), "gated": False, "num_kv_heads": kv, "qkv_bias": bias,
        "o_bias": bias, "mlp_bias": bias, "parallel": "" if not parallel else "two" if norms == 2 else "one",
        "activation": config.get("activation") or "gelu",
    }  # fmt: skip
