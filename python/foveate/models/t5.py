"""T5: encoder and decoder with bucketed relative positions (Raffel et al. 2020, arXiv 1910.10683); v1.0, v1.1, Flan-T5, mT5.

UMT5 has a table of relative positions in every layer, and LongT5's encoder attends within a window.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.models.encoder_decoder import CrossAttention, DecoderCache, EncoderDecoder, mask_option, padding_mask
from foveate.models.layers import RMSNorm, activation, gated, need, split_heads
from foveate.models.recompute import feed, recomputed
from foveate.models.sequences import PackedSequences, attend
from foveate.ops.attention.relative_bias import RelativeBias
from foveate.ops.rms_norm import rms_norm


@dataclass(frozen=True)
class T5Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: str = "relu"
    gated: bool = False
    dropout: float = 0.0  # in training mode
    tied: bool = True  # the head is the embedding
    scaled: bool = True  # the head's input is multiplied by hidden_size**-0.5, as v1.0 was trained
    start_id: int = 0  # the decoder's first token
    pad_id: int = 0
    table_per_layer: bool = False  # UMT5: each layer has a table of relative positions of its own
    local_radius: int | None = None  # LongT5: how many tokens before and after itself a token of the source attends to

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> T5Config:
        """From config.json. transformers 5 writes `scale_decoder_outputs` and says of every T5 that it is tied."""
        kind = config.get("model_type")
        mt5 = kind == "mt5"
        name = config.get("feed_forward_proj", "gated-gelu" if kind in ("mt5", "umt5") else "relu")
        gate, _, act = name.rpartition("-")
        if gate not in ("", "gated"):
            raise CheckpointError(
                f"feed_forward_proj={name!r} is not understood; known are 'relu' or 'gated-gelu' and the like"
            )
        local = config.get("encoder_attention_type", "local")
        if local != "local":
            raise CheckpointError(
                f"encoder_attention_type={local!r} is not supported for LongT5; load a checkpoint of 'local', such as long-t5-local-base"
            )
        tied = config.get("tie_word_embeddings") is not False
        layers = need(config, "num_layers")
        pad_id = config.get("pad_token_id") or 0
        start_id = config.get("decoder_start_token_id")
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=need(config, "d_model"),
            intermediate_size=need(config, "d_ff"),
            num_layers=layers,
            num_decoder_layers=config.get("num_decoder_layers") or layers,
            num_heads=need(config, "num_heads"),
            head_dim=need(config, "d_kv"),
            buckets=config.get("relative_attention_num_buckets", 32),
            max_distance=config.get("relative_attention_max_distance", 128),
            norm_eps=config.get("layer_norm_epsilon", 1e-6),
            activation="gelu_new" if name == "gated-gelu" else act,
            gated=gate == "gated",
            dropout=config.get("dropout_rate", 0.1),
            tied=tied,
            scaled=bool(config.get("scale_decoder_outputs", tied and not mt5)),
            start_id=pad_id if start_id is None else start_id,
            pad_id=pad_id,
            table_per_layer=kind == "umt5",
            local_radius=config.get("local_radius", 127) if kind == "longt5" else None,
        )


class T5Attention(nn.Module):
    """Scores are q.k + bias, not scaled: T5 folds D**-0.5 into its initialisation."""

    def __init__(self, config: T5Config, relative: bool = False) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.heads, self.dropout = config.num_heads, config.dropout
        self.q = nn.Linear(config.hidden_size, inner, bias=False)
        self.k = nn.Linear(config.hidden_size, inner, bias=False)
        self.v = nn.Linear(config.hidden_size, inner, bias=False)
        self.o = nn.Linear(inner, config.hidden_size, bias=False)
        if relative:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.num_heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, H, D] each."""
        return split_heads(self.k(x), self.heads), split_heads(self.v(x), self.heads)

    def forward(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        packed: PackedSequences | None,
        keys: PackedSequences | None = None,
        **options: Any,
    ) -> Tensor:
        """x [B, Sq, hidden], k and v [B, Skv, H, D]. B may be beams times that of k: the beams of a text then share its keys."""
        q = split_heads(self.q(x), self.heads)
        out = attend(
            q.reshape(k.shape[0], -1, *q.shape[2:]), k, v, packed, keys, scale=1.0,
            dropout_p=self.dropout if self.training else 0.0, **options,
        )  # fmt: skip
        return self.o(out.reshape(*x.shape[:2], -1))


class T5DenseReluDense(nn.Module):
    def __init__(self, config: T5Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gated = config.gated
        if config.gated:
            self.wi_0 = nn.Linear(hidden, inner, bias=False)
            self.wi_1 = nn.Linear(hidden, inner, bias=False)
        else:
            self.wi = nn.Linear(hidden, inner, bias=False)
        self.wo = nn.Linear(inner, hidden, bias=False)
        self.activation = activation(config.activation)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        inputs = (self.wi_0(x), self.wi_1(x)) if self.gated else (self.wi(x),)
        if (
            x.dtype is torch.float16
        ):  # the sums of the large T5s are beyond fp16: wo, whose weight is fp32 then, gives fp32
            return self.wo(self.dropout(self._inner(*inputs)).float())
        if self.training and self.dropout.p:
            return self.wo(self.dropout(self._inner(*inputs)))
        return feed(self.wo, self._inner, *inputs)

    def _inner(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        return self.activation(gate) if up is None else gated(self.activation, gate, up)


class T5Sublayer(nn.Module):
    """A norm and the block that it feeds, under Hugging Face's name."""

    def __init__(self, name: str, block: nn.Module, config: T5Config) -> None:
        super().__init__()
        self.add_module(name, block)
        self.layer_norm = RMSNorm(config.hidden_size, config.norm_eps)


class T5Block(nn.Module):
    def __init__(self, config: T5Config, relative: bool, decoder: bool) -> None:
        super().__init__()
        local = config.local_radius is not None and not decoder
        parts = [T5Sublayer("LocalSelfAttention" if local else "SelfAttention", T5Attention(config, relative), config)]
        if decoder:
            parts.append(T5Sublayer("EncDecAttention", T5Attention(config), config))
        parts.append(T5Sublayer("DenseReluDense", T5DenseReluDense(config), config))
        self.layer = nn.ModuleList(parts)
        self.dropout = nn.Dropout(config.dropout)
        self.window = {"window": (config.local_radius, config.local_radius)} if local else {}

    @property
    def self_attention(self) -> T5Attention:
        first: Any = self.layer[0]
        return first.LocalSelfAttention if self.window else first.SelfAttention

    def forward(
        self,
        x: Tensor,
        bias: RelativeBias,
        index: int,
        mask: Tensor | None,
        cache: DecoderCache | None,
        packed: PackedSequences | None,
    ) -> Tensor:
        """x [B, S, hidden]; index: of this block among the decoder's, for the cache."""
        layer: Any = self.layer
        y = _normed(layer[0].layer_norm, x)
        with recomputed(y, layer[0].layer_norm, x):
            attention = self.self_attention
            k, v = attention.keys_values(y)
            if cache is not None:
                k, v = cache.append(index, k, v)
            masks: dict[str, Any] = {**mask_option(mask), **self.window} if cache is None else {"causal": True}
            out = attention(y, k, v, packed, relative_bias=bias, **masks)
        x = x + self.dropout(out)
        if cache is not None:
            k, v = cache.cross[index]
            y = _normed(layer[1].layer_norm, x)
            with recomputed(y, layer[1].layer_norm, x):
                out = layer[1].EncDecAttention(y, k, v, packed, cache.packed, **mask_option(mask))
            x = x + self.dropout(out)
        y = _normed(layer[-1].layer_norm, x)
        with recomputed(y, layer[-1].layer_norm, x):
            return x + self.dropout(layer[-1].DenseReluDense(y))


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """norm(x) in the weight's dtype: of fp16 models the stream between the blocks is fp32, which does not overflow."""
    if x.dtype is norm.weight.dtype:
        return norm(x)
    return rms_norm(x, norm.weight.to(x.dtype), norm.eps).to(norm.weight.dtype)


class T5Stack(nn.Module):
    def __init__(self, config: T5Config, decoder: bool) -> None:
        super().__init__()
        self.decoder, self.max_distance, self.table_per_layer = decoder, config.max_distance, config.table_per_layer
        layers = config.num_decoder_layers if decoder else config.num_layers
        # the first layer's table serves all layers of the stack, unless each has its own
        self.block = nn.ModuleList(T5Block(config, i == 0 or config.table_per_layer, decoder) for i in range(layers))
        self.final_layer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: DecoderCache | None = None, packed: PackedSequences | None = None
    ) -> Tensor:
        """x [B, S, hidden]. mask [B, 1, 1, source length] over the encoder's tokens. The decoder has a cache, also in training."""
        x = self.dropout(x.float() if x.dtype is torch.float16 else x)
        blocks: Any = self.block
        for i, block in enumerate(blocks):
            if i == 0 or self.table_per_layer:
                table = block.self_attention.relative_attention_bias.weight
                bias = RelativeBias(table, bidirectional=not self.decoder, max_distance=self.max_distance)
            x = block(x, bias, i, mask, cache, packed)
        return self.dropout(_normed(self.final_layer_norm, x))


class T5(EncoderDecoder):
    """Encoder-decoder with Hugging Face's parameter names.

    In float16 the `wo` of the feed-forward layers and the stream between the blocks are fp32: both outgrow float16 in trained models.
    """

    config_class = T5Config
    prefix = "transformer."
    # Copies of `shared`, and a table that the first release stored though cross-attention has no relative positions.
    ignored = re.compile(
        r"(encoder|decoder)\.embed_tokens\.weight|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    )
    transposed = None
    fp32_beside_fp16 = re.compile(r".*\.wo\.weight")

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = T5Stack(config, decoder=False)
        self.decoder = T5Stack(config, decoder=True)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tied = {"lm_head.weight": "shared.weight"} if config.tied else {}
        if config.tied:
            self.lm_head.weight = self.shared.weight

    def encode(
        self, tokens: Tensor, attention_mask: Tensor | None = None, packed: PackedSequences | None = None
    ) -> Tensor:
        return self.encoder(self.shared(tokens), padding_mask(attention_mask), packed=packed)

    def decode(self, tokens: Tensor, cache: DecoderCache, packed: PackedSequences | None = None) -> Tensor:
        hidden = self.decoder(self.shared(tokens), cache.mask, cache, packed)
        return hidden * self.config.hidden_size**-0.5 if self.config.scaled else hidden

    def cross_attention(self) -> list[CrossAttention]:
        blocks: Any = self.decoder.block
        return [block.layer[1].EncDecAttention for block in blocks]
