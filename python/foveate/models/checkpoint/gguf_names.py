"""The architectures of GGUF files: what their tensors are called here, and what of config.json their metadata says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Value = Callable[..., Any]  # value(key, default) of the architecture's metadata

_LLAMA_LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.gate_proj", "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}  # fmt: skip
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_LAYER = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}  # fmt: skip
_LLAMA_OTHER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_OTHER = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head",
}  # fmt: skip
_BERT_LAYER = {
    "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
    "attn_qkv": "attention.self.Wqkv", "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense", "ffn_gate": "intermediate.gate", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
}  # fmt: skip
_BERT_OTHER = {
    "token_embd": "embeddings.word_embeddings", "token_types": "embeddings.token_type_embeddings",
    "position_embd": "embeddings.position_embeddings", "token_embd_norm": "embeddings.LayerNorm",
}  # fmt: skip
ENCODERS = ("bert", "nomic_bert")  # model types whose names are BERT's
# Tensors that are several modules here, as `split.py` divides them.
FUSED = {
    "mlp.experts.gate_proj": "experts_gate", "mlp.experts.up_proj": "experts_up", "mlp.experts.down_proj": "experts_down",
}  # fmt: skip


@dataclass(frozen=True)
class GgufArchitecture:
    """model_type: of config.json. layer: names that differ from Llama's. config: keys of config.json, beside those of `llama_config`.

    permuted: rows of attn_q and attn_k stand with the two of a rotary pair side by side. plus_one: norms are stored as 1 + weight.
    """

    model_type: str
    layer: Mapping[str, str] = field(default_factory=dict)
    config: Callable[[Value], dict[str, Any]] = lambda value: {}
    permuted: bool = False
    plus_one: bool = False
    fused: Mapping[str, str] = field(default_factory=dict)
    epsilon: str = "attention.layer_norm_rms_epsilon"

    def layer_parts(self) -> tuple[str, ...]:
        """What a layer's tensors may be called in files, "attn_q" and so on."""
        if self.model_type == "gpt2" or self.model_type in ENCODERS:
            return tuple(_GPT2_LAYER if self.model_type == "gpt2" else _BERT_LAYER)
        return ("attn_sinks", *{**_LLAMA_LAYER, **_EXPERTS, **self.layer})

    def other_parts(self) -> tuple[str, ...]:
        """Those outside of the layers."""
        if self.model_type in ENCODERS:
            return tuple(_BERT_OTHER)
        return tuple(_GPT2_OTHER if self.model_type == "gpt2" else _LLAMA_OTHER)

    def huggingface_name(self, name: str) -> str:
        """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight; names outside of the table stay as they are."""
        gpt2 = self.model_type == "gpt2"
        others, prefix = (_GPT2_OTHER, "transformer.h.") if gpt2 else (_LLAMA_OTHER, "model.layers.")
        parts = _GPT2_LAYER if gpt2 else {**_LLAMA_LAYER, **_EXPERTS, **self.layer}
        if self.model_type in ENCODERS:
            others, prefix, parts = _BERT_OTHER, "encoder.layer.", _BERT_LAYER
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            if part == "attn_sinks":
                return f"{prefix}{layer}.self_attn.sinks"
            return f"{prefix}{layer}.{parts[part]}.{kind}" if part in parts else name
        part, _, kind = name.rpartition(".")
        return f"{others[part]}.{kind}" if part in others else name


def _gemma2(value: Value) -> dict[str, Any]:
    hidden, heads, layers = value("embedding_length"), value("attention.head_count"), value("block_count")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": value("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": value("final_logit_softcapping", 30.0),
        # Not in the file. The 27B model, told by its 46 layers, divides by hidden / heads, the others by the head dim.
        "query_pre_attn_scalar": hidden // heads if layers == 46 else value("attention.key_length", hidden // heads),
    }


def _gemma3(value: Value) -> dict[str, Any]:
    hidden, heads, layers = value("embedding_length"), value("attention.head_count"), value("block_count")
    scaling = {"rope_type": "linear", "factor": factor} if (factor := value("rope.scaling.factor", 1.0)) != 1 else {}
    return {
        "hidden_activation": "gelu_pytorch_tanh", "final_logit_softcapping": value("final_logit_softcapping", None),
        # as for Gemma 2; the 27B model has 62 layers
        "query_pre_attn_scalar": hidden // heads if layers == 62 else value("attention.key_length", hidden // heads),
        "rope_scaling": scaling, "rope_theta": value("rope.freq_base", 1e6), "rope_local_base_freq": value("rope.freq_base_swa", 1e4),
    }  # fmt: skip


def _experts(normalize: bool) -> Callable[[Value], dict[str, Any]]:
    def config(value: Value) -> dict[str, Any]:
        shared = value("expert_shared_feed_forward_length", None)
        return {
            "num_experts": value("expert_count"), "num_local_experts": value("expert_count"),
            "num_experts_per_tok": value("expert_used_count"),
            "moe_intermediate_size": value("expert_feed_forward_length", value("feed_forward_length", None)),
            "norm_topk_prob": normalize, "intermediate_size": value("feed_forward_length", 1),
        } | ({} if shared is None else {"shared_expert_intermediate_size": shared})  # fmt: skip

    return config


def _gpt_oss(value: Value) -> dict[str, Any]:
    return _experts(False)(value) | {"intermediate_size": value("expert_feed_forward_length")}


def _granite(value: Value) -> dict[str, Any]:
    return {
        "attention_multiplier": value("attention.scale", 1.0), "embedding_multiplier": value("embedding_scale", 1.0),
        "residual_multiplier": value("residual_scale", 1.0), "logits_scaling": value("logit_scale", 1.0),
    }  # fmt: skip


def _cohere(value: Value) -> dict[str, Any]:
    return {"logit_scale": value("logit_scale", 0.0625), "layer_norm_eps": value("attention.layer_norm_epsilon", 1e-5)}


_LAYER_NORM = "attention.layer_norm_epsilon"
ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", permuted=True),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "gemma2": GgufArchitecture("gemma2", _SANDWICH, _gemma2, plus_one=True),
    "gpt2": GgufArchitecture("gpt2"),
    "gemma": GgufArchitecture("gemma", plus_one=True),
    "gemma3": GgufArchitecture("gemma3_text", _SANDWICH, _gemma3, plus_one=True),
    "phi3": GgufArchitecture(
        "phi3", {"ffn_up": "mlp.gate_up_proj"},
        fused={"self_attn.qkv_proj": "qkv", "mlp.gate_up_proj": "gate_up"},
    ),
    "qwen2moe": GgufArchitecture("qwen2_moe", config=_experts(False), fused=FUSED),
    "qwen3moe": GgufArchitecture("qwen3_moe", config=_experts(True), fused=FUSED),
    "gpt-oss": GgufArchitecture(
        "gpt_oss", {"post_attention_norm": "post_attention_layernorm"}, _gpt_oss, fused=FUSED
    ),
    "olmo2": GgufArchitecture(
        "olmo2", {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
    ),
    "granite": GgufArchitecture("granite", config=_granite, permuted=True),
    "smollm3": GgufArchitecture("smollm3", permuted=True),
    "command-r": GgufArchitecture("cohere", config=_cohere, epsilon=_LAYER_NORM),
    "cohere2": GgufArchitecture("cohere2", config=_cohere, epsilon=_LAYER_NORM),
    "starcoder2": GgufArchitecture(
        "starcoder2", config=lambda value: {"norm_epsilon": value(_LAYER_NORM)}, epsilon=_LAYER_NORM
    ),
    "ernie4_5": GgufArchitecture("ernie4_5"),
    "seed_oss": GgufArchitecture("seed_oss", {"post_attention_norm": "post_attention_layernorm"}),
    "arcee": GgufArchitecture("arcee", permuted=True),
    "bert": GgufArchitecture("bert", epsilon=_LAYER_NORM),
    "nomic-bert": GgufArchitecture("nomic_bert", fused={"self.Wqkv": "query_key_value"}, epsilon=_LAYER_NORM),
}  # fmt: skip
MIXTRAL = GgufArchitecture("mixtral", config=_experts(True), permuted=True, fused=FUSED)  # its files say llama
