"""T5: encoder and decoder with bucketed relative positions (Raffel et al. 2020, arXiv 1910.10683); v1.0, v1.1, Flan-T5, mT5."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
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

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> T5Config:
        """From config.json. transformers 5 writes `scale_decoder_outputs` and says of every T5 that it is tied."""
        mt5 = config.get("model_type") == "mt5"
        name = config.get("feed_forward_proj", "gated-gelu" if mt5 else "relu")
        gate, _, act = name.rpartition("-")
        if gate not in ("", "gated"):
            raise CheckpointError(
                f"feed_forward_proj={name!r} is not understood; known are 'relu' or 'gated-gelu' and the like"
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
        if relative:  # the first layer's table serves all layers of the stack
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
        parts = [T5Sublayer("SelfAttention", T5Attention(config, relative), config)]
        if decoder:
            parts.append(T5Sublayer("EncDecAttention", T5Attention(config), config))
        parts.append(T5Sublayer("DenseReluDense", T5DenseReluDense(config), config))
        self.layer = nn.ModuleList(parts)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        bias: RelativeBias,
        index: int,
        mask: Tensor | None,
        cache: T5Cache | None,
        packed: PackedSequences | None,
    ) -> Tensor:
        """x [B, S, hidden]; index: of this block among the decoder's, for the cache."""
        layer: Any = self.layer
        y = _normed(layer[0].layer_norm, x)
        with recomputed(y, layer[0].layer_norm, x):
            k, v = layer[0].SelfAttention.keys_values(y)
            if cache is not None:
                k, v = cache.append(index, k, v)
            masks = _mask_option(mask) if cache is None else {"causal": True}
            out = layer[0].SelfAttention(y, k, v, packed, relative_bias=bias, **masks)
        x = x + self.dropout(out)
        if cache is not None:
            k, v = cache.cross[index]
            y = _normed(layer[1].layer_norm, x)
            with recomputed(y, layer[1].layer_norm, x):
                out = layer[1].EncDecAttention(y, k, v, packed, cache.packed, **_mask_option(mask))
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
        self.decoder, self.max_distance = decoder, config.max_distance
        layers = config.num_decoder_layers if decoder else config.num_layers
        self.block = nn.ModuleList(T5Block(config, i == 0, decoder) for i in range(layers))
        self.final_layer_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: T5Cache | None = None, packed: PackedSequences | None = None
    ) -> Tensor:
        """x [B, S, hidden]. mask [B, 1, 1, source length] over the encoder's tokens. The decoder has a cache, also in training."""
        first: Any = self.block[0]
        table = first.layer[0].SelfAttention.relative_attention_bias.weight
        bias = RelativeBias(table, bidirectional=not self.decoder, max_distance=self.max_distance)
        x = self.dropout(x.float() if x.dtype is torch.float16 else x)
        for i, block in enumerate(self.block):
            x = block(x, bias, i, mask, cache, packed)
        return self.dropout(_normed(self.final_layer_norm, x))


class T5Cache:
    """Keys and values of the decoder: those of the source, computed once, and those of the tokens so far.

    cross: for each layer k, v [B, source length, H, D]; mask: [B, 1, 1, source length] or None. The decoder's rows may be beams
    times B. Without `keep`, nothing is kept after a call, which is then a whole decoder pass. packed: the sources' places.
    """

    def __init__(
        self,
        model: T5,
        encoded: Tensor,
        attention_mask: Tensor | None,
        keep: bool = True,
        packed: PackedSequences | None = None,
    ) -> None:
        blocks: Any = model.decoder.block
        self.cross = [block.layer[1].EncDecAttention.keys_values(encoded) for block in blocks]
        self.mask = _mask(attention_mask)
        self.keep, self.packed = keep, packed
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * len(self.cross)
        self._lengths = [0] * len(self.cross)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of the layer so far, [B, length, H, D] each. Storage doubles when it is full."""
        if not self.keep:
            return k, v
        start, length = self._lengths[layer], self._lengths[layer] + k.shape[1]
        kept = self._kept[layer]
        if kept is None or kept[0].shape[1] < length:
            room = max(16, 2 * length)
            grown = tuple(x.new_empty(x.shape[0], room, *x.shape[2:]) for x in (k, v))
            if kept is not None:
                for new, old in zip(grown, kept):
                    new[:, :start] = old[:, :start]
            kept = self._kept[layer] = (grown[0], grown[1])
        kept[0][:, start:length] = k
        kept[1][:, start:length] = v
        self._lengths[layer] = length
        return kept[0][:, :length], kept[1][:, :length]

    def reorder(self, rows: Tensor) -> None:
        """The decoder's row i goes on from what was row rows[i]: beam search. rows must stay with their text."""
        self._kept = [None if kept is None else (kept[0][rows], kept[1][rows]) for kept in self._kept]


class T5(nn.Module):
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
        """tokens int64 [B, S] -> [B, S, hidden]. attention_mask [B, S]: not 0 where there is text, None for everywhere.

        packed: tokens [1, total] are several sources.
        """
        return self.encoder(self.shared(tokens), _mask(attention_mask), packed=packed)

    def decode(self, tokens: Tensor, cache: T5Cache, packed: PackedSequences | None = None) -> Tensor:
        """The next tokens int64 [B * beams, S] of each target -> [B * beams, S, hidden], ready for `logits`.

        packed: tokens [1, total] are the targets of the cache's packed sources.
        """
        hidden = self.decoder(self.shared(tokens), cache.mask, cache, packed)
        return hidden * self.config.hidden_size**-0.5 if self.config.scaled else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]"""
        return self.lm_head(hidden)

    def forward(self, tokens: Tensor, decoder_tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, target length, vocab] of each target token after decoder_tokens (see `shift_right`); differentiable."""
        cache = T5Cache(self, self.encode(tokens, attention_mask), attention_mask, keep=False)
        return self.logits(self.decode(decoder_tokens, cache))

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels [B, S]: the start token, then all labels but the last; -100 becomes padding."""
        start = labels.new_full((labels.shape[0], 1), self.config.start_id)
        shifted = torch.cat([start, labels[:, :-1]], 1)
        return shifted.masked_fill(shifted == -100, self.config.pad_id)


def _mask_option(mask: Tensor | None) -> dict[str, Tensor]:
    """Packed attention takes no mask at all."""
    return {} if mask is None else {"mask": mask}


def _mask(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.bool()[:, None, None, :]
