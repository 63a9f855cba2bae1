"""The decoder of Llama and of the families in decoder_families.py: one module, told apart by its config."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from foveate.cache.view import CacheView
from foveate.models.decoder_config import LOCAL, NONE, LlamaConfig
from foveate.models.experts import Experts
from foveate.models.latent_attention import LatentAttention
from foveate.models.layers import LayerNorm, RMSNorm, activation, gated, split_heads
from foveate.models.recompute import feed, recomputed
from foveate.models.rotary import Rotary
from foveate.models.sequences import PackedSequences, attend, check_positions
from foveate.ops.rotary import apply_rotary

_SWIGLU_ALPHA = 1.702  # gpt-oss


def _norm(config: LlamaConfig, size: int | None = None) -> nn.Module:
    size = config.hidden_size if size is None else size
    if config.norm == "rms":
        return RMSNorm(size, config.norm_eps, config.norm_offset)
    return LayerNorm(
        size, config.norm_eps, bias=config.norm == "layer_bias", plain=config.norm == "plain", offset=config.norm_offset
    )


def _head_norm(config: LlamaConfig, heads: int) -> nn.Module:
    D, eps = config.head_dim, config.norm_eps
    if config.qk_norm in (True, "rms"):
        return RMSNorm(D, eps, config.norm_offset)
    if config.qk_norm == "rms_all":
        return RMSNorm(heads * D, eps)
    return LayerNorm((heads, D) if config.qk_norm == "layer_heads" else D, eps, bias=config.qk_norm == "layer_bias")


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
            self.q_norm = _head_norm(config, config.num_heads)
            self.k_norm = _head_norm(config, config.num_kv_heads)
        self.sinks = nn.Parameter(torch.zeros(config.num_heads)) if config.sinks else None
        window = config.windows[layer]
        self.options: dict[str, Any] = {
            "causal": True,
            "window": None if window is None else (window - 1, None),
            "scale": config.scale,
            "softcap": config.attn_softcap,
        }

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cache: CacheView | None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """x [B, S, hidden]; cos, sin [max_positions, rot / 2], or with `packed` those of each token; None for a layer without RoPE."""
        config, options = self.config, dict(self.options)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if config.clip_qkv is not None:
            q, k, v = (y.clamp(-config.clip_qkv, config.clip_qkv) for y in (q, k, v))
        if config.qk_norm == "rms_all":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (
            split_heads(q, config.num_heads),
            split_heads(k, config.num_kv_heads),
            split_heads(v, config.num_kv_heads),
        )
        if config.qk_norm and config.qk_norm != "rms_all" and not config.qk_norm_after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.sinks is not None:
            options["sinks"] = self.sinks
        if config.alibi:
            options["alibi_slopes"] = alibi_slopes(config.num_heads, q.device)
        rotate_here = cache is None or config.qk_norm_after_rope
        if cos is not None and sin is not None and rotate_here:
            if cache is not None:
                cos, sin = cos[cache.positions()], sin[cache.positions()]
            elif packed is None:
                cos, sin = cos[: x.shape[1]], sin[: x.shape[1]]
            q, k = apply_rotary(q, k, cos, sin, interleaved=config.rope_interleaved)
            if config.qk_norm_after_rope:
                q, k = self.q_norm(q), self.k_norm(k)
        if cache is None:
            dropout_p = config.attention_dropout if self.training else 0.0
            out = attend(q, k, v, packed, dropout_p=dropout_p, **options)
        else:
            if cos is not None and not rotate_here:
                options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": config.rope_interleaved}
            out = cache.attend(self.layer, q, k, v, batch_invariant=True, **options)
        return self.o_proj(out.flatten(2))


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """fp32 [heads]: a geometric sequence, for numbers of heads that are no power of two with every other one of the next (Press et al.
    2021, arXiv 2108.12409)."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4 * (i + 1) / power) for i in range(0, 2 * (heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


class LlamaMLP(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), or down(activation(up(x))) where the config has no gate."""

    def __init__(self, config: LlamaConfig, inner: int | None = None) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.mlp_bias
        inner = config.intermediate_size if inner is None else inner
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if config.gated else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.activation = activation(config.activation)
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj is None:
            return feed(self.down_proj, self.activation, self.up_proj(x))
        return feed(self.down_proj, self._inner, self.gate_proj(x), self.up_proj(x))

    def _inner(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
            return (up + 1) * (gate * torch.sigmoid(gate * _SWIGLU_ALPHA))
        return gated(self.activation, gate, up)


class LlamaLayer(nn.Module):
    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.post_norms, self.pre_norms = config.post_norms, config.pre_norms
        self.parallel, self.residual_scale = config.parallel, config.residual_scale
        self.self_attn = (
            LlamaAttention(config, layer) if config.latent is None else LatentAttention(config, config.latent, layer)
        )
        experts = config.experts_of(layer)
        if experts is None:
            self.mlp: nn.Module = LlamaMLP(config)
        else:
            self.mlp = Experts(config.hidden_size, experts, lambda inner: LlamaMLP(config, inner))
        if config.pre_norms:
            self.input_layernorm = _norm(config)
        # Llama calls the norm before the MLP post_attention_layernorm. In Gemma 2 that name is the norm of attention's output.
        if config.parallel != "one":
            self.post_attention_layernorm = _norm(config)
        if config.post_norms:
            if config.pre_norms:
                self.pre_feedforward_layernorm = _norm(config)
            self.post_feedforward_layernorm = _norm(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cache: CacheView | None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        y = self.input_layernorm(x) if self.pre_norms else x
        with recomputed(y, self.input_layernorm, x) if self.pre_norms else nullcontext():
            out = self.self_attn(y, cos, sin, cache, packed)
        if self.parallel:
            z = y if self.parallel == "one" else self.post_attention_layernorm(x)
            return x + out + self.mlp(z)
        x = x + self._scaled(self.post_attention_layernorm(out) if self.post_norms else out)
        if not self.pre_norms:
            return x + self._scaled(self.post_feedforward_layernorm(self.mlp(x)))
        norm = self.pre_feedforward_layernorm if self.post_norms else self.post_attention_layernorm
        y = norm(x)
        with recomputed(y, norm, x):
            out = self.mlp(y)
        return x + self._scaled(self.post_feedforward_layernorm(out) if self.post_norms else out)

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.residual_scale is None else out * self.residual_scale


class LlamaDecoder(nn.Module):
    """Embedding, layers and final norm: the `model` of Hugging Face's names."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(config, i) for i in range(config.num_layers))
        self.embed_norm = _norm(config) if config.embed_norm else None
        self.embed_positions: nn.Embedding | None = None
        if config.learned_positions is not None:
            self.embed_positions = nn.Embedding(config.max_positions + config.learned_positions, config.hidden_size)
        self.norm = _norm(config)


class Llama(nn.Module):
    """A causal language model of the Llama family (Touvron et al. 2023, arXiv 2302.13971), with Hugging Face's parameter names."""

    config_class = LlamaConfig
    prefix = "model."
    # constants that old checkpoints store
    ignored = re.compile(
        r".*\.(rotary_emb\.inv_freq|attention\.bias|attention\.masked_bias|self_attn\.(bias|masked_bias))"
    )
    transposed = None

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = LlamaDecoder(config)
        # None in checkpoints of embedding models, which have no head
        self.lm_head: nn.Linear | None = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        self.tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tied else {}
        if config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        rot = config.rotary_dim or config.head_dim
        self.rotary = Rotary(rot, config.max_positions, config.rope_theta, config.rope_scaling)
        local = LOCAL in config.rope_layers
        settings = (config.local_rope_theta, config.local_rope_scaling)
        self.local_rotary = Rotary(rot, config.max_positions, *settings) if local else self.rotary

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
        first = self.config.learned_positions
        if self.model.embed_positions is not None and first is not None:
            if packed is not None:
                positions = packed.positions
            else:
                positions = torch.arange(tokens.shape[-1], device=x.device) if cache is None else cache.positions()
            x = x + self.model.embed_positions(positions + first)
        if self.model.embed_norm is not None:
            x = self.model.embed_norm(x)
        tables = self._tables(x, tokens, cache, packed)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, *tables[self.config.rope_of(i)], cache, packed)
        return self.model.norm(x)

    def set_context(self, wanted: int | None) -> int:
        """How many tokens sequences with a cache may have: `wanted`, or as many as the model was made for.

        A model with RoPE factors for short and for long texts (longrope) takes the short ones up to its first context, which is the
        answer to None, and the long ones for all texts if more are wanted: keys in a cache cannot change theirs.
        """
        most, short = self.config.max_positions, self.rotary.short_positions
        if short is None:
            return wanted or most
        self.rotary.long = wanted is not None and wanted > short
        return wanted or min(short, most)

    def _tables(
        self, x: Tensor, tokens: Tensor, cache: CacheView | None, packed: PackedSequences | None
    ) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        longest = tokens.shape[-1] if packed is None else packed.longest
        length = longest if cache is None else cache.capacity
        tables: dict[str, tuple[Tensor | None, Tensor | None]] = {NONE: (None, None)}
        kinds = {self.config.rope_of(i) for i in range(self.config.num_layers)} - {NONE}
        for kind in kinds:
            rotary = self.local_rotary if kind == LOCAL else self.rotary
            cos, sin = rotary.tables(x.device, x.dtype, length, cached=cache is not None)
            tables[kind] = (cos, sin) if packed is None else (cos[packed.positions], sin[packed.positions])
        return tables

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] in hidden's dtype."""
        if self.lm_head is None:
            raise ValueError(
                "this checkpoint has no language-model head; use its hidden states, e.g. by foveate.Embedder"
            )
        out = self.lm_head(hidden)
        if self.config.logit_scale is not None:
            out = out * self.config.logit_scale
        cap = self.config.final_softcap
        return out if cap is None else cap * torch.tanh(out / cap)

    def forward(self, tokens: Tensor, cache: CacheView | None = None) -> Tensor:
        return self.logits(self.hidden(tokens, cache))
