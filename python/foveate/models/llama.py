"""The Llama family: Llama, SmolLM2, Mistral, Qwen2, Qwen3, Gemma 2. One decoder, told apart by its config."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.cache.view import CacheView
from foveate.files.checked import CheckpointError
from foveate.models.layers import RMSNorm, Rotary, activation, gated, need, split_heads
from foveate.models.recompute import feed, recomputed
from foveate.models.sequences import PackedSequences, attend, check_positions
from foveate.ops.rotary import apply_rotary

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")


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
    activation: str = "silu"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3: RMSNorm of each head of q and k, before RoPE
    windows: tuple[int | None, ...] = ()  # of each layer: how many tokens a query sees, itself included
    scale: float | None = None  # of q.k; None: head_dim**-0.5
    attn_softcap: float | None = None
    final_softcap: float | None = None
    norm_offset: float = 0.0  # Gemma: norms multiply by 1 + weight
    post_norms: bool = False  # Gemma 2: norms after attention and MLP too
    embed_scale: float | None = None  # Gemma: embeddings times sqrt(hidden_size)
    attention_dropout: float = 0.0  # in training mode

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> LlamaConfig:
        """From config.json; both `rope_theta` + `rope_scaling` and transformers 5's `rope_parameters` are read."""
        kind = config["model_type"]
        gemma = kind == "gemma2"
        heads, layers = need(config, "num_attention_heads"), need(config, "num_hidden_layers")
        hidden = need(config, "hidden_size")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if float(rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
            raise CheckpointError("partial_rotary_factor other than 1 is not supported for the Llama family")
        if hidden % heads and not config.get("head_dim") and kind not in ("qwen3", "gemma2"):
            raise CheckpointError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        if (config.get("head_dim") or 2) % 2 or (not config.get("head_dim") and (hidden // heads) % 2):
            raise CheckpointError(
                f"head_dim={config.get('head_dim') or hidden // heads} is odd; RoPE turns pairs of elements"
            )
        default_head_dim = {"qwen3": 128, "gemma2": 256}.get(kind, hidden // heads)
        attention_bias = kind == "qwen2" or (kind != "mistral" and bool(config.get("attention_bias")))
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=need(config, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or default_head_dim,
            max_positions=need(config, "max_position_embeddings"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            activation=need(config, "hidden_activation", "hidden_act") if gemma else config.get("hidden_act", "silu"),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=rope or None,
            tied=bool(config.get("tie_word_embeddings", gemma)),
            qkv_bias=attention_bias,
            o_bias=attention_bias and kind != "qwen2",
            mlp_bias=bool(config.get("mlp_bias")),
            qk_norm=kind == "qwen3",
            windows=_windows(config, kind, layers),
            scale=config.get("query_pre_attn_scalar", 256) ** -0.5 if gemma else None,
            attn_softcap=config.get("attn_logit_softcapping") if gemma else None,
            final_softcap=config.get("final_logit_softcapping") if gemma else None,
            norm_offset=1.0 if gemma else 0.0,
            post_norms=gemma,
            embed_scale=hidden**0.5 if gemma else None,
            attention_dropout=config.get("attention_dropout") or 0.0,
        )


def _windows(config: dict[str, Any], kind: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer. Mistral: all; Gemma 2: every other; Qwen: from max_window_layers on, if switched on."""
    window = config.get("sliding_window") or None  # 0: none
    if kind == "llama" or window is None or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        return (None,) * layers
    if kind == "mistral":
        return (window,) * layers
    types = config.get("layer_types")
    if types is None and kind == "gemma2":
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    elif types is None:
        first = config.get("max_window_layers", 28)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    if len(types) != layers:
        raise CheckpointError(f"layer_types has {len(types)} entries for {layers} layers")
    return tuple(window if name == "sliding_attention" else None for name in types)


class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        hidden, D = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * D, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_kv_heads * D, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_kv_heads * D, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_heads * D, hidden, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(D, config.norm_eps)
            self.k_norm = RMSNorm(D, config.norm_eps)
        window = config.windows[layer]
        self.options: dict[str, Any] = {
            "causal": True,
            "window": None if window is None else (window - 1, None),
            "scale": config.scale,
            "softcap": config.attn_softcap,
        }

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: CacheView | None, packed: PackedSequences | None = None
    ) -> Tensor:
        """x [B, S, hidden]; cos, sin [max_positions, D / 2], or with `packed` those of each token."""
        q = split_heads(self.q_proj(x), self.config.num_heads)
        k = split_heads(self.k_proj(x), self.config.num_kv_heads)
        v = split_heads(self.v_proj(x), self.config.num_kv_heads)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if cache is None:
            S = x.shape[1]
            q, k = apply_rotary(q, k, cos[:S], sin[:S])
            dropout_p = self.config.attention_dropout if self.training else 0.0
            out = attend(q, k, v, packed, dropout_p=dropout_p, **self.options)
        else:
            out = cache.attend(
                self.layer, q, k, v, rotary_cos=cos, rotary_sin=sin, batch_invariant=True, **self.options
            )
        return self.o_proj(out.flatten(2))


class LlamaMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        return feed(self.down_proj, self._inner, self.gate_proj(x), self.up_proj(x))

    def _inner(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated(self.activation, gate, up)


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)

        self.post_norms = config.post_norms
        self.self_attn = LlamaAttention(config, layer)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = norm()
        # Llama calls the norm before the MLP post_attention_layernorm. In Gemma 2 that name is the norm of attention's output.
        self.post_attention_layernorm = norm()
        if config.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: CacheView | None, packed: PackedSequences | None = None
    ) -> Tensor:
        y = self.input_layernorm(x)
        with recomputed(y, self.input_layernorm, x):
            out = self.self_attn(y, cos, sin, cache, packed)
        x = x + (self.post_attention_layernorm(out) if self.post_norms else out)
        norm = self.pre_feedforward_layernorm if self.post_norms else self.post_attention_layernorm
        y = norm(x)
        with recomputed(y, norm, x):
            out = self.mlp(y)
        return x + (self.post_feedforward_layernorm(out) if self.post_norms else out)


class LlamaDecoder(nn.Module):
    """Embedding, layers and final norm: the `model` of Hugging Face's names."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm_offset)


class Llama(nn.Module):
    """A causal language model of the Llama family (Touvron et al. 2023, arXiv 2302.13971), with Hugging Face's parameter names."""

    config_class = LlamaConfig
    prefix = "model."
    ignored = re.compile(r".*rotary_emb\.inv_freq")
    transposed = None

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaDecoder(config)
        # None in checkpoints of embedding models, which have no head
        self.lm_head: nn.Linear | None = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.rotary = Rotary(config.head_dim, config.max_positions, config.rope_theta, config.rope_scaling)

    def hidden(self, tokens: Tensor, cache: CacheView | None = None, packed: PackedSequences | None = None) -> Tensor:
        """tokens int64 [B, S] -> [B, S, hidden] after the final norm.

        Without a cache the S tokens attend causally to each other, differentiable. With one they continue each sequence at
        cache.lens. packed: tokens [1, total] are several sequences (without a cache). ValueError for more tokens than
        max_positions.
        """
        check_positions(tokens, packed, self.config.max_positions)
        x = self.model.embed_tokens(tokens)
        if self.config.embed_scale is not None:
            # rounded to x's dtype, as the model was trained
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype, device="cpu")
        longest = tokens.shape[-1] if packed is None else packed.longest
        cos, sin = self.rotary.tables(x.device, x.dtype, longest if cache is None else cache.capacity)
        if packed is not None:
            cos, sin = cos[packed.positions], sin[packed.positions]
        for layer in self.model.layers:
            x = layer(x, cos, sin, cache, packed)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] in hidden's dtype."""
        if self.lm_head is None:
            raise ValueError(
                "this checkpoint has no language-model head; use its hidden states, e.g. by foveate.Embedder"
            )
        out = self.lm_head(hidden)
        cap = self.config.final_softcap
        return out if cap is None else cap * torch.tanh(out / cap)

    def forward(self, tokens: Tensor, cache: CacheView | None = None) -> Tensor:
        return self.logits(self.hidden(tokens, cache))
