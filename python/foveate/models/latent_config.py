"""LatentConfig: the sizes of multi-head latent attention, and what DeepSeek's families set of LlamaConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.files.checked import CheckpointError
from foveate.models.experts import ExpertsConfig
from foveate.models.layers import need
from foveate.models.rotary import yarn_scale


@dataclass(frozen=True)
class LatentConfig:
    """Attention to a latent of all heads (MLA, DeepSeek-V2, arXiv 2405.04434): `rank` elements that hold the heads' keys and values, and
    `rope` elements with RoPE. nope, value: of each head, what its key has beside RoPE's elements, and its value. query_rank: of the latent
    that queries are made of; None: they are made of x.
    """

    rank: int
    rope: int
    nope: int
    value: int
    query_rank: int | None = None


def deepseek(config: dict[str, Any]) -> dict[str, Any]:
    """V2 and V3, whose routers differ."""
    newer = config["model_type"] == "deepseek_v3"
    latent = LatentConfig(
        need(config, "kv_lora_rank"), need(config, "qk_rope_head_dim"), need(config, "qk_nope_head_dim"), need(config, "v_head_dim"),
        config.get("q_lora_rank"),
    )  # fmt: skip
    if latent.rope % 2:
        raise CheckpointError(f"qk_rope_head_dim={latent.rope} is odd; RoPE rotates pairs of elements")
    bias = bool(config.get("attention_bias"))
    found: dict[str, Any] = {
        "latent": latent, "num_kv_heads": 1, "head_dim": latent.rope + latent.rank, "rotary_dim": latent.rope,
        "rope_interleaved": bool(config.get("rope_interleave", True)), "qkv_bias": bias, "o_bias": bias,
        "scale": (latent.nope + latent.rope) ** -0.5 * _yarn_scale(config) ** 2,
    }  # fmt: skip
    count = config.get("n_routed_experts") or config.get("num_experts") or 0
    if not count:
        return found
    method = config.get("topk_method", "noaux_tc" if newer else "greedy")
    if method != "noaux_tc" and (newer or method not in ("greedy", "group_limited_greedy")):
        raise CheckpointError(f"topk_method={method!r} is not supported for {config['model_type']}")
    if not newer and config.get("norm_topk_prob"):
        raise CheckpointError("norm_topk_prob is not supported for deepseek_v2; the published models are without")
    grouped = newer or method == "group_limited_greedy"
    inner = need(config, "moe_intermediate_size")
    layers, dense = config["num_hidden_layers"], config.get("first_k_dense_replace", 3 if newer else 0)
    return found | {
        "experts": ExpertsConfig(
            count, need(config, "num_experts_per_tok"), inner, router="sigmoid" if newer else "softmax",
            normalize=newer and bool(config.get("norm_topk_prob", True)), scale=float(config.get("routed_scaling_factor", 1.0)),
            groups=(config.get("n_group") or 1) if grouped else 1, top_groups=(config.get("topk_group") or 1) if grouped else 1,
            shared_inner=inner * (config.get("n_shared_experts") or 0),
        ),
        "expert_layers": tuple(i >= dense for i in range(layers)),
    }  # fmt: skip


def _yarn_scale(config: dict[str, Any]) -> float:
    """By what DeepSeek multiplies queries and keys of stretched texts."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    every = rope.get("mscale_all_dim")
    kind = rope.get("rope_type", rope.get("type", "default"))
    return yarn_scale(need(rope, "factor"), every) if every and kind != "default" else 1.0
