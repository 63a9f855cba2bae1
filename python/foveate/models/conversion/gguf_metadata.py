"""The metadata of a GGUF file: what config.json says of a model, under the keys that llama.cpp reads."""

from __future__ import annotations

from typing import Any

import torch

from foveate.files.checked import CheckpointError
from foveate.models.rotary import Rotary

_FILE_TYPES = {
    "F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "q4_1": "MOSTLY_Q4_1",
    "q4_k": "MOSTLY_Q4_K_S", "q5_k": "MOSTLY_Q5_K_S", "q6_k": "MOSTLY_Q6_K", "iq4_nl": "MOSTLY_IQ4_NL", "q4_k_m": "MOSTLY_Q4_K_M",
    "q5_k_m": "MOSTLY_Q5_K_M",
}  # fmt: skip


def file_type(name: str) -> int:
    """general.file_type of a quantization or of a float type."""
    import gguf

    return int(getattr(gguf.LlamaFileType, _FILE_TYPES[name]))


def add_model(writer: Any, arch: str, config: Any, model_type: str) -> dict[str, torch.Tensor]:
    """Writes the keys of the architecture, and returns the tensors that say how RoPE is scaled: fp32 [rot / 2], by their names."""
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    experts = getattr(config, "experts", None)
    writer.add_feed_forward_length(config.intermediate_size)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
        return {}
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if windows := {window for window in config.windows if window is not None}:
        if len(windows) > 1:
            raise CheckpointError(
                f"windows of {sorted(windows)} tokens have no place in a GGUF file, which has one length for all"
            )
        writer.add_sliding_window(windows.pop())
    if experts is not None:
        writer.add_expert_count(experts.count)
        writer.add_expert_used_count(experts.per_token)
        writer.add_expert_feed_forward_length(experts.inner)
        if experts.shared_inner:
            writer.add_expert_shared_feed_forward_length(experts.shared_inner)
    if config.attn_softcap is not None:
        writer.add_attn_logit_softcapping(config.attn_softcap)
    if config.final_softcap is not None:
        writer.add_final_logit_softcapping(config.final_softcap)
    if model_type == "granite":
        writer.add_attention_scale(config.scale)
        writer.add_embedding_scale(config.embed_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(1 / config.logit_scale)
    elif config.logit_scale is not None:
        writer.add_logit_scale(config.logit_scale)
    return _add_rope(writer, config)


def _add_rope(writer: Any, config: Any) -> dict[str, torch.Tensor]:
    import gguf

    rotated = config.rotary_dim or config.head_dim
    writer.add_rope_dimension_count(rotated)
    writer.add_rope_freq_base(config.rope_theta)
    if "local" in config.rope_layers:
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", config.local_rope_theta)
    scaling = config.rope_scaling or {}
    kind = str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind == "default" or (kind == "linear" and scaling.get("factor") == 1):
        return {}
    if kind in ("llama3", "divisors"):
        plain = 1.0 / config.rope_theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
        scaled = Rotary(rotated, config.max_positions, config.rope_theta, scaling).frequencies
        return {"rope_freqs.weight": plain / scaled}
    first = int(scaling.get("original_max_position_embeddings") or config.max_positions)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        return {}
    if kind == "yarn":
        if (
            scaling.get("attention_factor") is not None
            or scaling.get("mscale_all_dim")
            or scaling.get("beta_fast") not in (None, 32)
        ):
            raise CheckpointError(
                "yarn with an attention factor, mscale or betas of its own has no place in a GGUF file here"
            )
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(scaling.get("factor") or config.max_positions / first))
        writer.add_rope_scaling_orig_ctx_len(first)
        return {}
    if kind in ("longrope", "su"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(first)
        writer.add_rope_scaling_attn_factors(Rotary(rotated, config.max_positions, config.rope_theta, scaling).factor)
        return {f"rope_factors_{name}.weight": torch.tensor(scaling[f"{name}_factor"]) for name in ("long", "short")}
    raise CheckpointError(f"rope_scaling of type {kind!r} has no place in a GGUF file; --to safetensors keeps it")
