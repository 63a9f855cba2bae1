"""LlamaConfig: everything that the families of decoders differ in, read from config.json with their table (decoder_families.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.files.checked import CheckpointError
from foveate.models.decoder_families import FAMILIES
from foveate.models.experts import ExpertsConfig
from foveate.models.latent_config import LatentConfig
from foveate.models.layers import need

GLOBAL, LOCAL, NONE = "global", "local", "none"  # which rotary table a layer has


@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-6
    latent_norm_eps: float = 1e-6  # of the norms within latent attention
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    # The norm of each head of q and k: "" for none; "rms", "layer" and "layer_bias" over the head dim; "rms_all" over all heads together;
    # "layer_heads" with weights of each head's own
    qk_norm: str | bool = ""
    qk_norm_after_rope: bool = False
    windows: tuple[int | None, ...] = ()  # of each layer: how many tokens a query sees, itself included
    scale: float | None = None  # of q.k; None: head_dim**-0.5
    attn_softcap: float | None = None
    final_softcap: float | None = None
    norm: str = "rms"  # or "layer", "layer_bias", "plain": LayerNorm with a weight, with a bias too, with neither
    norm_offset: float = 0.0  # Gemma: norms multiply by 1 + weight
    pre_norms: bool = True
    post_norms: bool = False  # Gemma 2: norms after attention and MLP too; OLMo 2: only there
    parallel: str = ""  # attention and MLP read the same x: with "one" norm for both, or "two"
    embed_norm: bool = False  # BLOOM
    embed_scale: float | None = None  # Gemma: embeddings times sqrt(hidden_size)
    residual_scale: float | None = None  # Granite: of what attention and MLP add
    logit_scale: float | None = None
    gated: bool = True  # the MLP is down(activation(gate) * up), else down(activation(up))
    swiglu_limit: float | None = None  # gpt-oss: (up + 1) * gate * sigmoid(1.702 * gate), gate and up clamped
    rotary_dim: int = 0  # of the head dim, from its beginning; 0: all
    rope_interleaved: bool = False  # pairs are neighbours
    rope_layers: tuple[str, ...] = ()  # of each layer: "global", "local", "none"; () for all global
    local_rope_theta: float = 10000.0
    local_rope_scaling: dict[str, Any] | None = None
    alibi: bool = False  # positions by ALiBi's slopes instead
    learned_positions: int | None = None  # OPT: by a table instead, whose rows begin so many before the first position
    sinks: bool = False
    clip_qkv: float | None = None
    latent: LatentConfig | None = None  # then num_kv_heads is 1 and head_dim rope + rank, as the cache has them
    experts: ExpertsConfig | None = None
    expert_layers: tuple[bool, ...] = ()  # which layers have them; () for all
    attention_dropout: float = 0.0  # in training mode

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """From config.json; both `rope_theta` + `rope_scaling` and transformers 5's `rope_parameters` are read."""
        kind = config["model_type"]
        family = FAMILIES[kind]
        given = {family.keys.get(key, key): value for key, value in config.items()}
        config = {**family.defaults, **{key: value for key, value in given.items() if value is not None}}
        config["model_type"] = kind
        heads, layers = need(config, "num_attention_heads"), need(config, "num_hidden_layers")
        hidden = need(config, "hidden_size")
        if hidden % heads and not config.get("head_dim"):
            raise CheckpointError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        head_dim = config.get("head_dim") or hidden // heads
        if head_dim % 2 and not family.without_rope:
            raise CheckpointError(f"head_dim={head_dim} is odd; RoPE rotates pairs of elements")
        config |= {"head_dim": head_dim, "num_key_value_heads": config.get("num_key_value_heads") or heads}
        rope, local = _rope(config)
        positions = need(config, "max_position_embeddings")
        if (
            rope.get("rope_type", rope.get("type")) == "yarn"
        ):  # the config of a model to be stretched may have its first context
            first = rope.get("original_max_position_embeddings") or positions
            positions = max(positions, int(first * (rope.get("factor") or 1)))
        share = float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
        rotary_dim = int(head_dim * share)
        if rotary_dim % 2 or (rotary_dim < 2 and not family.without_rope):
            raise CheckpointError(
                f"partial_rotary_factor={share} of head_dim={head_dim} is {rotary_dim} elements, which are no pairs"
            )
        bias = bool(config.get("attention_bias"))
        fields: dict[str, Any] = {
            "vocab_size": need(config, "vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": config.get("intermediate_size") or _four_times(config),
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": config["num_key_value_heads"],
            "head_dim": head_dim,
            "max_positions": positions,
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "activation": config.get("hidden_act", "silu"),
            "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            "rope_scaling": rope or None,
            "local_rope_theta": float(local.get("rope_theta") or 10000.0),
            "local_rope_scaling": local or None,
            "tied": bool(config.get("tie_word_embeddings", False)),
            "qkv_bias": bias,
            "o_bias": bias,
            "mlp_bias": bool(config.get("mlp_bias")),
            "windows": (None,) * layers,
            "rotary_dim": rotary_dim if rotary_dim != head_dim else 0,
            "attention_dropout": config.get("attention_dropout") or 0.0,
        } | family.knobs(config)
        return cls(**fields)

    @property
    def head_dim_v(self) -> int:
        """The head dim of the cache's values."""
        return self.head_dim if self.latent is None else self.latent.rank

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """None for a layer whose MLP is dense."""
        return self.experts if not self.expert_layers or self.expert_layers[layer] else None

    def rope_of(self, layer: int) -> str:
        if self.alibi or self.learned_positions is not None:
            return NONE
        return self.rope_layers[layer] if self.rope_layers else GLOBAL


def _four_times(config: dict[str, Any]) -> int:
    """The width of the MLP: 4 * hidden_size in families whose configs do not say it."""
    return (
        4 * config["hidden_size"]
        if config["model_type"] in ("bloom", "mpt", "gptj", "gpt_neo", "falcon")
        else need(config, "intermediate_size")
    )


def _rope(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the rotary tables of global layers and of local ones."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "full_attention" in rope or "sliding_attention" in rope:  # transformers 5, Gemma 3
        both = dict(rope.get("full_attention") or {}), dict(rope.get("sliding_attention") or {})
    else:
        both = dict(rope), {"rope_theta": config.get("rope_local_base_freq")}
    for one in both:
        if one and one.get("original_max_position_embeddings") is None:
            one["original_max_position_embeddings"] = config.get("original_max_position_embeddings")
    return both
