"""The decoder families, each once: how a checkpoint of it differs from Llama's in its config, in names and in fused weights.

All run through `llama.Llama`, one decoder told apart by its `LlamaConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from foveate.files.checked import CheckpointError
from foveate.models import older_families as older
from foveate.models.experts import ExpertsConfig
from foveate.models.latent_config import deepseek
from foveate.models.layers import need

Config = dict[str, Any]


@dataclass(frozen=True)
class DecoderFamily:
    """name: of transformers' class. defaults: values of config.json's keys where it has none. keys: config.json's key -> Llama's.

    knobs: fields of LlamaConfig that the family sets, from the config with defaults, keys, head_dim and num_key_value_heads filled in.
    names: (pattern, replacement) for `re.sub`, in this order, from stored names to Llama's. fused: a stored module that is several here,
    see `split.py`. trains: exports have the same names as the checkpoints.
    """

    name: str
    knobs: Callable[[Config], dict[str, Any]] = lambda config: {}
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, str] = field(default_factory=dict)
    without_rope: bool = False

    @property
    def trains(self) -> bool:
        return not self.names and not self.fused


def _all_windows(config: Config) -> tuple[int | None, ...]:
    return (config.get("sliding_window") or None,) * config["num_hidden_layers"]


def _windows(config: Config, pattern: int | None = None) -> tuple[int | None, ...]:
    """By layer_types; without them every pattern-th layer sees everything, and the others the window; None: all see everything."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window") or None
    types = config.get("layer_types")
    if types is None:
        if pattern is None:
            return (None,) * layers
        types = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)]
    if len(types) != layers:
        raise CheckpointError(f"layer_types has {len(types)} entries for {layers} layers")
    known = ("full_attention", "sliding_attention")
    if unknown := [name for name in types if name not in known]:
        raise CheckpointError(
            f"layer_types has {unknown[0]!r}, which is not supported for {config['model_type']}; known are {', '.join(known)}"
        )
    return tuple(window if name == "sliding_attention" else None for name in types)


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    """From max_window_layers on, if switched on."""
    if not config.get("use_sliding_window"):
        return (None,) * config["num_hidden_layers"]
    if config.get("layer_types") is None:
        first, layers = config.get("max_window_layers", 28), config["num_hidden_layers"]
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
        config = {**config, "layer_types": types}
    return _windows(config)


def _qwen(**fields: Any) -> Callable[[Config], dict[str, Any]]:
    return lambda config: {"windows": _qwen_windows(config), **fields}


def _qwen_experts(config: Config) -> dict[str, Any]:
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    count = need(config, "num_experts")
    return {
        "windows": _qwen_windows(config),
        "experts": ExpertsConfig(
            count, need(config, "num_experts_per_tok"), need(config, "moe_intermediate_size"),
            normalize=bool(config.get("norm_topk_prob", False)),
            shared_inner=config.get("shared_expert_intermediate_size", 0), shared_gate="shared_expert_intermediate_size" in config,
        ),
        "expert_layers": tuple(
            i not in dense and count > 0 and (i + 1) % step == 0 for i in range(config["num_hidden_layers"])
        ),
    }  # fmt: skip


def _gemma(config: Config) -> dict[str, Any]:
    return {
        "norm_offset": 1.0, "embed_scale": config["hidden_size"] ** 0.5,
        "activation": config.get("hidden_activation") or config.get("hidden_act") or "gelu_pytorch_tanh",
    }  # fmt: skip


def _gemma2(config: Config) -> dict[str, Any]:
    return _gemma(config) | {
        "windows": _windows(config, 2), "scale": config["query_pre_attn_scalar"] ** -0.5, "post_norms": True,
        "attn_softcap": config.get("attn_logit_softcapping"), "final_softcap": config.get("final_logit_softcapping"),
    }  # fmt: skip


def _gemma3(config: Config) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise CheckpointError(
            "use_bidirectional_attention is not supported for gemma3_text (EmbeddingGemma); the decoders of Gemma 3 are"
        )
    windows = _windows(config, config.get("sliding_window_pattern", 6))
    return _gemma2(config) | {
        "windows": windows, "qk_norm": "rms", "attn_softcap": None,
        "rope_layers": tuple("global" if window is None else "local" for window in windows),
    }  # fmt: skip


def _mixtral(config: Config) -> dict[str, Any]:
    experts = ExpertsConfig(
        need(config, "num_local_experts"),
        need(config, "num_experts_per_tok"),
        need(config, "intermediate_size"),
        normalize=True,
    )
    return {"windows": _all_windows(config), "experts": experts}


def _gpt_oss(config: Config) -> dict[str, Any]:
    experts = ExpertsConfig(
        need(config, "num_local_experts"), need(config, "num_experts_per_tok"), need(config, "intermediate_size"), router="top",
        router_bias=True,
    )  # fmt: skip
    return {
        "windows": _windows(config, 2), "sinks": True, "mlp_bias": True, "experts": experts,
        "swiglu_limit": config.get("swiglu_limit", 7.0),
    }  # fmt: skip


def _olmo(config: Config) -> dict[str, Any]:
    return {"norm": "plain", "norm_eps": 1e-5, "clip_qkv": config.get("clip_qkv")}


def _olmo2(config: Config) -> dict[str, Any]:
    windows = _windows(config, 4 if config["model_type"] == "olmo3" else None)
    ropes = tuple("global" if window is None else "local" for window in windows)
    return {
        "qk_norm": "rms_all", "pre_norms": False, "post_norms": True, "windows": windows,
        "rope_layers": ropes if config["model_type"] == "olmo3" else (),
        "local_rope_theta": float((config.get("rope_parameters") or {}).get("rope_theta") or config.get("rope_theta", 10000.0)),
    }  # fmt: skip


def _olmoe(config: Config) -> dict[str, Any]:
    experts = ExpertsConfig(
        need(config, "num_experts"), need(config, "num_experts_per_tok"), need(config, "intermediate_size"),
        normalize=bool(config.get("norm_topk_prob", False)),
    )  # fmt: skip
    return {"qk_norm": "rms_all", "clip_qkv": config.get("clip_qkv"), "experts": experts}


def _granite(config: Config) -> dict[str, Any]:
    scaling = float(config.get("logits_scaling", 1.0))
    if scaling == 0:
        raise CheckpointError("logits_scaling is 0, and logits are divided by it; take the config of these weights")
    found: dict[str, Any] = {
        "scale": float(config.get("attention_multiplier", 1.0)), "embed_scale": float(config.get("embedding_multiplier", 1.0)),
        "residual_scale": float(config.get("residual_multiplier", 1.0)), "logit_scale": 1.0 / scaling,
    }  # fmt: skip
    if config["model_type"] == "granitemoe":
        found["experts"] = ExpertsConfig(
            need(config, "num_local_experts"),
            need(config, "num_experts_per_tok"),
            need(config, "intermediate_size"),
            router="top",
        )
    return found


def _smollm3(config: Config) -> dict[str, Any]:
    layers, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    turned = config.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    if len(turned) != layers:
        raise CheckpointError(f"no_rope_layers has {len(turned)} entries for {layers} layers")
    windows = _qwen_windows(config) if config.get("layer_types") else (None,) * layers
    return {"rope_layers": tuple("global" if has else "none" for has in turned), "windows": windows}


def _cohere(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = {
        "norm": "layer", "norm_eps": config.get("layer_norm_eps", 1e-5), "parallel": "one", "rope_interleaved": True,
        "logit_scale": config.get("logit_scale", 0.0625), "qk_norm": "layer_heads" if config.get("use_qk_norm") else "",
    }  # fmt: skip
    if config["model_type"] == "cohere2":
        windows = _windows(config, 4)
        found |= {
            "windows": windows, "qk_norm": "",
            "rope_layers": tuple("none" if window is None else "global" for window in windows),
        }  # fmt: skip
    return found


def _stablelm(config: Config) -> dict[str, Any]:
    if config.get("qk_layernorm"):
        raise CheckpointError(
            "qk_layernorm is not supported for stablelm; models without it, such as StableLM 2 1.6B, are"
        )
    bias = bool(config.get("use_qkv_bias"))
    parallel = "one" if config.get("use_parallel_residual") else ""
    return {
        "norm": "layer_bias", "norm_eps": config.get("layer_norm_eps", 1e-5), "qkv_bias": bias, "o_bias": False,
        "parallel": parallel,
    }  # fmt: skip


def _phi(config: Config) -> dict[str, Any]:
    return {
        "norm": "layer_bias", "norm_eps": config.get("layer_norm_eps", 1e-5), "parallel": "one", "qkv_bias": True, "o_bias": True,
        "mlp_bias": True, "head_bias": True, "gated": False, "qk_norm": "layer_bias" if config.get("qk_layernorm") else "",
        "activation": config.get("hidden_act", "gelu_new"),
    }  # fmt: skip


def _gpt_neox(config: Config) -> dict[str, Any]:
    return {
        "norm": "layer_bias", "norm_eps": config.get("layer_norm_eps", 1e-5), "gated": False, "mlp_bias": True,
        "num_kv_heads": config["num_attention_heads"],
        "parallel": "two" if config.get("use_parallel_residual", True) else "", "activation": config.get("hidden_act", "gelu"),
    }  # fmt: skip


def _starcoder2(config: Config) -> dict[str, Any]:
    bias = bool(config.get("use_bias", True))
    return {
        "norm": "layer_bias", "norm_eps": config.get("norm_epsilon", 1e-5), "gated": False, "qkv_bias": bias, "o_bias": bias,
        "mlp_bias": bias, "windows": _all_windows(config), "activation": config.get("hidden_act", "gelu_pytorch_tanh"),
    }  # fmt: skip


def _ernie(config: Config) -> dict[str, Any]:
    bias = bool(config.get("use_bias"))
    return {"rope_interleaved": True, "qkv_bias": bias, "o_bias": bias, "mlp_bias": bias}


def _exaone4(config: Config) -> dict[str, Any]:
    windows = _windows(config, config.get("sliding_window_pattern") if config.get("sliding_window") else None)
    mixed = bool(config.get("sliding_window"))
    ropes = tuple("global" if window is not None or not mixed else "none" for window in windows)
    return {"qk_norm": "rms", "pre_norms": False, "post_norms": True, "windows": windows, "rope_layers": ropes}


_GPTJ_KEYS = {
    "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}  # fmt: skip
_BLOOM_NAMES = (
    (r"^(transformer\.)?word_embeddings\.", "model.embed_tokens."), (r"^(transformer\.)?word_embeddings_layernorm\.", "model.embed_norm."),
    (r"^(transformer\.)?h\.", "model.layers."), (r"^(transformer\.)?ln_f\.", "model.norm."),
    (r"\.self_attention\.dense\.", ".self_attn.o_proj."), (r"\.self_attention\.", ".self_attn."),
    (r"\.dense_h_to_4h\.", ".up_proj."), (r"\.dense_4h_to_h\.", ".down_proj."),
)  # fmt: skip
_SANDWICH = (
    (r"\.post_attention_layernorm\.", ".pre_feedforward_layernorm."),
    (r"\.post_self_attn_layernorm\.", ".post_attention_layernorm."),
    (r"\.post_mlp_layernorm\.", ".post_feedforward_layernorm."),
)
_PHI_QKV = {"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": "gate_up"}
_SHARED_EXPERTS = ((r"\.shared_experts\.", ".shared_expert."),)
_STACKED = {"mlp.experts.gate_up_proj": "experts_gate_up", "mlp.experts.down_proj": "experts_down"}

FAMILIES: dict[str, DecoderFamily] = {
    "llama": DecoderFamily("LlamaForCausalLM"),
    "mistral": DecoderFamily(
        "MistralForCausalLM", lambda config: {"windows": _all_windows(config), "qkv_bias": False, "o_bias": False}
    ),
    "ministral": DecoderFamily("MinistralForCausalLM", lambda config: {"windows": _windows(config)}),
    "qwen2": DecoderFamily("Qwen2ForCausalLM", _qwen(qkv_bias=True, o_bias=False)),
    "qwen3": DecoderFamily("Qwen3ForCausalLM", _qwen(qk_norm="rms"), {"head_dim": 128}),
    "gemma2": DecoderFamily(
        "Gemma2ForCausalLM", _gemma2, {"head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256}
    ),
    "gemma": DecoderFamily("GemmaForCausalLM", _gemma, {"head_dim": 256, "tie_word_embeddings": True}),
    "gemma3_text": DecoderFamily(
        "Gemma3ForCausalLM", _gemma3,
        {"head_dim": 256, "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "rope_theta": 1e6},
    ),
    "phi3": DecoderFamily(
        "Phi3ForCausalLM", lambda config: {"windows": _all_windows(config), "qkv_bias": False, "o_bias": False},
        {"rms_norm_eps": 1e-5}, fused=_PHI_QKV,
    ),
    "qwen3_moe": DecoderFamily(
        "Qwen3MoeForCausalLM", lambda config: _qwen_experts(config) | {"qk_norm": "rms"},
        keys={"num_local_experts": "num_experts"}, fused=_STACKED
    ),
    "qwen2_moe": DecoderFamily(
        "Qwen2MoeForCausalLM", lambda config: _qwen_experts(config) | {"qkv_bias": True, "o_bias": False}, fused=_STACKED
    ),
    "mixtral": DecoderFamily(
        "MixtralForCausalLM", _mixtral, {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
        names=(
            (r"\.block_sparse_moe\.", ".mlp."),
            (r"\.w1\.", ".gate_proj."), (r"\.w3\.", ".up_proj."), (r"\.w2\.", ".down_proj."),
        ),
        fused=_STACKED,
    ),
    "gpt_oss": DecoderFamily(
        "GptOssForCausalLM", _gpt_oss, {"head_dim": 64, "attention_bias": True, "rms_norm_eps": 1e-5, "rope_theta": 150000.0},
        names=((r"\.mlp\.router\.", ".mlp.gate."),),
        fused={
            "mlp.experts.gate_up_proj": "oss_gate_up", "mlp.experts.down_proj": "oss_down",
            "mlp.experts.gate_up_proj_bias": "oss_gate_up_bias", "mlp.experts.down_proj_bias": "oss_down_bias",
        },
    ),
    "olmo": DecoderFamily("OlmoForCausalLM", _olmo),
    "olmo2": DecoderFamily("Olmo2ForCausalLM", _olmo2, {"rms_norm_eps": 1e-5}),
    "olmo3": DecoderFamily("Olmo3ForCausalLM", _olmo2, {"rms_norm_eps": 1e-5, "rope_theta": 5e5}),
    "olmoe": DecoderFamily("OlmoeForCausalLM", _olmoe, {"rms_norm_eps": 1e-5}, fused=_STACKED),
    "granite": DecoderFamily("GraniteForCausalLM", _granite),
    "granitemoe": DecoderFamily(
        "GraniteMoeForCausalLM", _granite,
        names=((r"\.block_sparse_moe\.router\.layer\.", ".mlp.gate."), (r"\.block_sparse_moe\.", ".mlp.")),
        fused={"mlp.input_linear": "experts_gate_up", "mlp.output_linear": "experts_down"},
    ),
    "deepseek_v2": DecoderFamily("DeepseekV2ForCausalLM", deepseek, names=_SHARED_EXPERTS, fused=_STACKED),
    "deepseek_v3": DecoderFamily("DeepseekV3ForCausalLM", deepseek, names=_SHARED_EXPERTS, fused=_STACKED),
    "smollm3": DecoderFamily("SmolLM3ForCausalLM", _smollm3, {"tie_word_embeddings": True, "rope_theta": 2e6}),
    "cohere": DecoderFamily("CohereForCausalLM", _cohere, {"tie_word_embeddings": True, "rope_theta": 5e5}),
    "cohere2": DecoderFamily("Cohere2ForCausalLM", _cohere, {"tie_word_embeddings": True}),
    "stablelm": DecoderFamily("StableLmForCausalLM", _stablelm, {"partial_rotary_factor": 0.25}),
    "phi": DecoderFamily(
        "PhiForCausalLM", _phi, {"partial_rotary_factor": 0.5},
        names=(
            (r"\.self_attn\.dense\.", ".self_attn.o_proj."), (r"\.mlp\.fc1\.", ".mlp.up_proj."), (r"\.mlp\.fc2\.", ".mlp.down_proj."),
            (r"\.q_layernorm\.", ".q_norm."), (r"\.k_layernorm\.", ".k_norm."), (r"^model\.final_layernorm\.", "model.norm."),
        ),
    ),
    "gpt_neox": DecoderFamily(
        "GPTNeoXForCausalLM", _gpt_neox, {"attention_bias": True, "max_position_embeddings": 2048},
        {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"},
        names=(
            (r"^gpt_neox\.embed_in\.", "model.embed_tokens."), (r"^gpt_neox\.final_layer_norm\.", "model.norm."),
            (r"^gpt_neox\.", "model."), (r"^embed_out\.", "lm_head."), (r"\.attention\.dense\.", ".self_attn.o_proj."),
            (r"\.attention\.", ".self_attn."), (r"\.dense_h_to_4h\.", ".up_proj."), (r"\.dense_4h_to_h\.", ".down_proj."),
        ),
        fused={"self_attn.query_key_value": "qkv_by_group"},
    ),
    "starcoder2": DecoderFamily(
        "Starcoder2ForCausalLM", _starcoder2, {"tie_word_embeddings": True},
        names=((r"\.mlp\.c_fc\.", ".mlp.up_proj."), (r"\.mlp\.c_proj\.", ".mlp.down_proj.")),
    ),
    "ernie4_5": DecoderFamily(
        "Ernie4_5ForCausalLM", _ernie,
        {"tie_word_embeddings": True, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e5},
    ),
    "seed_oss": DecoderFamily(
        "SeedOssForCausalLM", lambda config: {"o_bias": bool(config.get("attention_out_bias", False))},
        {"attention_bias": True, "head_dim": 128},
    ),
    "nemotron": DecoderFamily(
        "NemotronForCausalLM",
        lambda config: {
            "norm": "layer_bias", "norm_offset": 1.0, "norm_eps": config.get("norm_eps", 1e-5), "gated": False,
            "activation": config.get("hidden_act", "relu2"),
        },
        {"partial_rotary_factor": 0.5},
    ),
    "arcee": DecoderFamily("ArceeForCausalLM", lambda config: {"gated": False}, {"hidden_act": "relu2", "rms_norm_eps": 1e-5}),
    "exaone4": DecoderFamily("Exaone4ForCausalLM", _exaone4, {"rms_norm_eps": 1e-5}),
    "hunyuan_v1_dense": DecoderFamily(
        "HunYuanDenseV1ForCausalLM", lambda config: {"qk_norm": "rms", "qk_norm_after_rope": True}, {"rms_norm_eps": 1e-5},
        names=((r"\.query_layernorm\.", ".q_norm."), (r"\.key_layernorm\.", ".k_norm.")),
    ),
    "glm": DecoderFamily(
        "GlmForCausalLM", lambda config: {"rope_interleaved": True, "o_bias": False},
        {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7},
        fused={"mlp.gate_up_proj": "gate_up"},
    ),
    "glm4": DecoderFamily(
        "Glm4ForCausalLM", lambda config: {"rope_interleaved": True, "o_bias": False, "post_norms": True},
        {"attention_bias": True, "head_dim": 128, "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-7}, names=_SANDWICH,
        fused={"mlp.gate_up_proj": "gate_up"},
    ),
    "opt": DecoderFamily(
        "OPTForCausalLM", older.opt, {"tie_word_embeddings": True}, {"ffn_dim": "intermediate_size"},
        names=(
            (r"^(model\.)?decoder\.final_layer_norm\.", "model.norm."), (r"^(model\.)?decoder\.", "model."),
            (r"\.out_proj\.", ".o_proj."), (r"\.self_attn_layer_norm\.", ".input_layernorm."), (r"\.fc1\.", ".mlp.up_proj."),
            (r"\.fc2\.", ".mlp.down_proj."), (r"\.final_layer_norm\.", ".post_attention_layernorm."),
        ),
        without_rope=True,
    ),
    "bloom": DecoderFamily(
        "BloomForCausalLM", older.bloom, {"tie_word_embeddings": True, "max_position_embeddings": 2048},
        {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embed": "hidden_size",
         "seq_length": "max_position_embeddings"},
        names=_BLOOM_NAMES, fused={"self_attn.query_key_value": "qkv_by_group"}, without_rope=True,
    ),
    "mpt": DecoderFamily(
        "MptForCausalLM", older.mpt, {"tie_word_embeddings": True, "max_position_embeddings": 2048},
        {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
         "max_seq_len": "max_position_embeddings"},
        names=(
            (r"^(transformer\.)?wte\.", "model.embed_tokens."), (r"^(transformer\.)?blocks\.", "model.layers."),
            (r"^(transformer\.)?norm_f\.", "model.norm."), (r"\.norm_1\.", ".input_layernorm."),
            (r"\.norm_2\.", ".post_attention_layernorm."), (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.attn\.", ".self_attn."), (r"\.ffn\.", ".mlp."),
        ),
        fused={"self_attn.Wqkv": "qkv"}, without_rope=True,
    ),
    "gptj": DecoderFamily(
        "GPTJForCausalLM", older.gptj, keys=_GPTJ_KEYS,
        names=(
            (r"^(transformer\.)?wte\.", "model.embed_tokens."), (r"^(transformer\.)?h\.", "model.layers."),
            (r"^(transformer\.)?ln_f\.", "model.norm."), (r"\.ln_1\.", ".input_layernorm."),
            (r"\.attn\.out_proj\.", ".self_attn.o_proj."), (r"\.attn\.", ".self_attn."), (r"\.fc_in\.", ".up_proj."),
            (r"\.fc_out\.", ".down_proj."),
        ),
    ),
    "gpt_neo": DecoderFamily(
        "GPTNeoForCausalLM", older.gpt_neo, {"tie_word_embeddings": True, "max_position_embeddings": 2048},
        {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"},
        names=(
            (r"^(transformer\.)?wte\.", "model.embed_tokens."), (r"^(transformer\.)?wpe\.", "model.embed_positions."),
            (r"^(transformer\.)?h\.", "model.layers."), (r"^(transformer\.)?ln_f\.", "model.norm."),
            (r"\.ln_1\.", ".input_layernorm."), (r"\.ln_2\.", ".post_attention_layernorm."),
            (r"\.attn\.attention\.out_proj\.", ".self_attn.o_proj."), (r"\.attn\.attention\.", ".self_attn."),
            (r"\.mlp\.c_fc\.", ".mlp.up_proj."), (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        ),
        without_rope=True,
    ),
    "falcon": DecoderFamily(
        "FalconForCausalLM", older.falcon, {"tie_word_embeddings": True, "max_position_embeddings": 2048},
        {"ffn_hidden_size": "intermediate_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"},
        names=(
            *_BLOOM_NAMES, (r"\.ln_attn\.", ".input_layernorm."), (r"\.ln_mlp\.", ".post_attention_layernorm."),
        ),
        fused={"self_attn.query_key_value": "qkv_by_group"},
    ),
}  # fmt: skip
