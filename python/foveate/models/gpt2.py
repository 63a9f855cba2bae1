"""GPT-2, which is GPT-3's architecture at small size: learned positions, LayerNorm before each block, one projection for q, k, v."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.cache.view import CacheView
from foveate.files.checked import CheckpointError
from foveate.models.layers import activation, need, split_heads
from foveate.models.recompute import feed, recomputed
from foveate.models.sequences import PackedSequences, attend, check_positions

MODEL_TYPES = ("gpt2",)


@dataclass(frozen=True)
class GPT2Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float = 1e-5
    activation: str = "gelu_new"
    tied: bool = True
    scales: tuple[float, ...] = ()  # of q.k, for each layer
    embed_dropout: float = 0.0  # these three in training mode
    dropout: float = 0.0
    attention_dropout: float = 0.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> GPT2Config:
        """From config.json, whose names are n_embd, n_layer, n_head, n_positions."""
        hidden, heads, layers = need(config, "n_embd"), need(config, "n_head"), need(config, "n_layer")
        if config.get("add_cross_attention"):
            raise CheckpointError(
                "GPT-2 with add_cross_attention is not supported; only the decoder without an encoder is"
            )
        if hidden % heads:
            raise CheckpointError(f"n_embd={hidden} is not a multiple of n_head={heads}")
        scale = (hidden // heads) ** -0.5 if config.get("scale_attn_weights", True) else 1.0
        by_layer = bool(config.get("scale_attn_by_inverse_layer_idx"))
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=config.get("n_inner") or 4 * hidden,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
            max_positions=need(config, "n_positions", "n_ctx"),
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
            activation=config.get("activation_function", "gelu_new"),
            tied=bool(config.get("tie_word_embeddings", True)),
            scales=tuple(scale / (i + 1) if by_layer else scale for i in range(layers)),
            embed_dropout=config.get("embd_pdrop", 0.1),
            dropout=config.get("resid_pdrop", 0.1),
            attention_dropout=config.get("attn_pdrop", 0.1),
        )


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cache: CacheView | None, packed: PackedSequences | None = None) -> Tensor:
        q, k, v = (split_heads(y, self.config.num_heads) for y in self.c_attn(x).chunk(3, -1))
        scale = self.config.scales[self.layer]
        if cache is None:
            dropout_p = self.config.attention_dropout if self.training else 0.0
            out = attend(q, k, v, packed, causal=True, scale=scale, dropout_p=dropout_p)
        else:
            out = cache.attend(self.layer, q, k, v, causal=True, scale=scale, batch_invariant=True)
        return self.c_proj(out.flatten(2))


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        return feed(self.c_proj, self.activation, self.c_fc(x))


class GPT2Layer(nn.Module):
    def __init__(self, config: GPT2Config, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attn = GPT2Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GPT2MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: CacheView | None, packed: PackedSequences | None = None) -> Tensor:
        y = self.ln_1(x)
        with recomputed(y, self.ln_1, x):
            x = x + self.dropout(self.attn(y, cache, packed))
        y = self.ln_2(x)
        with recomputed(y, self.ln_2, x):
            return x + self.dropout(self.mlp(y))


class GPT2Decoder(nn.Module):
    """Embeddings, layers and final norm: the `transformer` of Hugging Face's names."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_positions, config.hidden_size)
        self.drop = nn.Dropout(config.embed_dropout)
        self.h = nn.ModuleList(GPT2Layer(config, i) for i in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class GPT2(nn.Module):
    """GPT-2 (Radford et al. 2019) with Hugging Face's parameter names. The linear weights are [out, in], unlike in its checkpoints."""

    config_class = GPT2Config
    prefix = "transformer."
    ignored = re.compile(r".*\.attn\.(bias|masked_bias)")  # the causal mask, which old checkpoints store
    transposed = re.compile(r".*\.(c_attn|c_proj|c_fc)\.weight")  # Hugging Face stores these [in, out]

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = GPT2Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tied = {"lm_head.weight": "transformer.wte.weight"} if config.tied else {}
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight

    def hidden(self, tokens: Tensor, cache: CacheView | None = None, packed: PackedSequences | None = None) -> Tensor:
        """tokens int64 [B, S] -> [B, S, hidden] after the final norm.

        Without a cache the S tokens attend causally to each other, differentiable. With one they continue each sequence at
        cache.lens. packed: tokens [1, total] are several sequences (without a cache). ValueError for more tokens than
        max_positions.
        """
        check_positions(tokens, packed, self.config.max_positions)
        if packed is not None:
            positions = packed.positions
        else:
            positions = torch.arange(tokens.shape[-1], device=tokens.device) if cache is None else cache.positions()
        x = self.transformer.drop(self.transformer.wte(tokens) + self.transformer.wpe(positions))
        for layer in self.transformer.h:
            x = layer(x, cache, packed)
        return self.transformer.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] in hidden's dtype."""
        return self.lm_head(hidden)

    def forward(self, tokens: Tensor, cache: CacheView | None = None) -> Tensor:
        return self.logits(self.hidden(tokens, cache))
