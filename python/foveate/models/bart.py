"""BART and its kin (encoder_decoder_families.py): encoder-decoders with absolute positions (Lewis et al. 2019, arXiv 1910.13461)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.models.encoder_decoder import CrossAttention, DecoderCache, EncoderDecoder, mask_option, padding_mask
from foveate.models.encoder_decoder_families import FAMILIES, EncoderDecoderFamily
from foveate.models.layers import activation, need, split_heads
from foveate.models.recompute import feed
from foveate.models.sequences import PackedSequences, attend


@dataclass(frozen=True)
class BartConfig:
    """Sizes of the encoder, and of the decoder where they may differ. family: the rest, see `EncoderDecoderFamily`."""

    vocab_size: int
    decoder_vocab_size: int
    hidden_size: int
    intermediate_size: int
    decoder_intermediate_size: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    num_decoder_heads: int
    max_positions: int
    family: EncoderDecoderFamily
    activation: str = "gelu"
    embedding_scale: float = 1.0
    dropout: float = 0.0  # of embeddings and blocks, in training mode
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    shared: bool = True  # one embedding for source and target
    tied: bool = True  # the head is the decoder's embedding
    start_id: int = 0  # the decoder's first token
    pad_id: int = 0
    eos_id: int = 2  # whose last one stands for a whole text
    num_labels: int = 3
    classifier_dropout: float = 0.0

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> BartConfig:
        family = FAMILIES[config.get("model_type", "bart")]
        config = {**family.defaults, **{key: value for key, value in config.items() if value is not None}}
        hidden = need(config, "d_model")
        heads, decoder_heads = need(config, "encoder_attention_heads"), need(config, "decoder_attention_heads")
        for name, count in (("encoder_attention_heads", heads), ("decoder_attention_heads", decoder_heads)):
            if hidden % count:
                raise CheckpointError(f"d_model={hidden} is not a multiple of {name}={count}")
        if family.positions != "learned" and (hidden % 2 or hidden < 4):
            raise CheckpointError(f"d_model={hidden} must be even, and at least 4, for sinusoidal positions")
        vocab = need(config, "vocab_size")
        if not 0 <= config["pad_token_id"] < vocab:
            raise CheckpointError(
                f"pad_token_id={config['pad_token_id']} is not one of the {vocab} ids that vocab_size names"
            )
        shared = config["share_encoder_decoder_embeddings"]
        # a start token that no file names is said with every text: the target's language
        start = config.get("decoder_start_token_id", config.get("eos_token_id", config["pad_token_id"]))
        return cls(
            vocab_size=vocab,
            decoder_vocab_size=vocab if shared else config.get("decoder_vocab_size", vocab),
            hidden_size=hidden,
            intermediate_size=need(config, "encoder_ffn_dim"),
            decoder_intermediate_size=need(config, "decoder_ffn_dim"),
            num_layers=need(config, "encoder_layers"),
            num_decoder_layers=need(config, "decoder_layers"),
            num_heads=heads,
            num_decoder_heads=decoder_heads,
            max_positions=config["max_position_embeddings"],
            family=family,
            activation=config["activation_function"],
            embedding_scale=math.sqrt(hidden) if config["scale_embedding"] else 1.0,
            dropout=config["dropout"],
            attention_dropout=config["attention_dropout"],
            activation_dropout=config["activation_dropout"],
            shared=shared,
            tied=config["tie_word_embeddings"],
            start_id=_first(start),
            pad_id=config["pad_token_id"],
            eos_id=_first(config.get("eos_token_id", 2)),
            num_labels=len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 3),
            classifier_dropout=config.get("classifier_dropout", 0.0),
        )


def _first(ids: int | list[int]) -> int:
    return ids[0] if isinstance(ids, list) else ids


class BartAttention(nn.Module):
    def __init__(self, config: BartConfig, heads: int) -> None:
        super().__init__()
        self.heads, self.dropout_p = heads, config.attention_dropout
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, H, D] each."""
        return split_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads)

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
        q = split_heads(self.q_proj(x), self.heads)
        q = q.reshape(k.shape[0], -1, *q.shape[2:])
        out = attend(q, k, v, packed, keys, dropout_p=self.dropout_p if self.training else 0.0, **options)
        return self.out_proj(out.reshape(*x.shape[:2], -1))


class BartLayer(nn.Module):
    """A layer of the encoder, or of the decoder, which attends to the source too."""

    def __init__(self, config: BartConfig, decoder: bool) -> None:
        super().__init__()
        heads = config.num_decoder_heads if decoder else config.num_heads
        inner = config.decoder_intermediate_size if decoder else config.intermediate_size
        self.pre_norm = config.family.pre_norm
        self.self_attn = BartAttention(config, heads)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        if decoder:
            self.encoder_attn = BartAttention(config, heads)
            self.encoder_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.activation = activation(config.activation)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def forward(
        self, x: Tensor, index: int, mask: Tensor | None, cache: DecoderCache | None, packed: PackedSequences | None
    ) -> Tensor:
        """x [B, S, hidden]; index: of this layer among the decoder's, for the cache."""
        y = self._before(self.self_attn_layer_norm, x)
        k, v = self.self_attn.keys_values(y)
        if cache is not None:
            k, v = cache.append(index, k, v)
        masks: dict[str, Any] = {**mask_option(mask)} if cache is None else {"causal": True}
        x = self._after(self.self_attn_layer_norm, x + self.dropout(self.self_attn(y, k, v, packed, **masks)))
        if cache is not None:
            k, v = cache.cross[index]
            y = self._before(self.encoder_attn_layer_norm, x)
            out = self.encoder_attn(y, k, v, packed, cache.packed, **mask_option(mask))
            x = self._after(self.encoder_attn_layer_norm, x + self.dropout(out))
        y = self.fc1(self._before(self.final_layer_norm, x))
        if self.training and self.activation_dropout.p:
            y = self.fc2(self.activation_dropout(self.activation(y)))
        else:
            y = feed(self.fc2, self.activation, y)
        x = self._after(self.final_layer_norm, x + self.dropout(y))
        if (
            cache is None and x.dtype is torch.float16
        ):  # as transformers: some channels of trained models grow beyond fp16
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.pre_norm else x

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.pre_norm else norm(x)


class Sinusoids(nn.Module):
    """A table of positions [count, size], sines in the first half and cosines in the second; made anew, never stored.

    after_padding: its frequencies are M2M-100's, which reach 1 / 10000 in the last channel.
    """

    def __init__(self, count: int, size: int, after_padding: bool) -> None:
        super().__init__()
        self.count, self.size, self.after_padding = count, size, after_padding
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def forward(self, positions: Tensor, like: Tensor) -> Tensor:
        """int64 [...] -> [..., size], of like's dtype."""
        key = (positions.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self._table().to(*key)
        return self._tables[key][positions]

    def _table(self) -> Tensor:
        half = self.size // 2
        if self.after_padding:  # in fp32, as the models were trained
            frequencies = torch.exp(torch.arange(half).float() * -(math.log(10000) / (half - 1)))
            angles = torch.arange(self.count).float()[:, None] * frequencies
        else:
            frequencies = 10000 ** (-2 * torch.arange(half, dtype=torch.float64) / self.size)
            angles = torch.arange(self.count, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)


class BartStack(nn.Module):
    def __init__(self, config: BartConfig, decoder: bool) -> None:
        super().__init__()
        family, hidden = config.family, config.hidden_size
        self.config, self.decoder = config, decoder
        self.embed_tokens = nn.Embedding(config.decoder_vocab_size if decoder else config.vocab_size, hidden)
        self.embed_positions: Any = None
        if family.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions + family.position_offset, hidden)
        else:
            after_padding = family.positions == "sinusoidal after padding"
            rows = config.max_positions + (config.pad_id + 1 if after_padding else 0)
            self.embed_positions = Sinusoids(rows, hidden, after_padding)
        layers = config.num_decoder_layers if decoder else config.num_layers
        self.layers = nn.ModuleList(BartLayer(config, decoder) for _ in range(layers))
        self.layernorm_embedding = nn.LayerNorm(hidden) if family.embedding_norm else None
        self.layer_norm = nn.LayerNorm(hidden) if family.pre_norm else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        cache: DecoderCache | None = None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """tokens [B, S] -> [B, S, hidden]. mask [B, 1, 1, source length]. The decoder has a cache, also in training."""
        before = 0 if cache is None else cache.length
        longest = before + (tokens.shape[1] if packed is None else packed.longest)
        if longest > self.config.max_positions:
            cure = "lower max_new_tokens" if self.decoder else "cut the text, or divide it at sentences"
            raise ValueError(f"{longest} tokens do not fit the model's {self.config.max_positions} positions; {cure}")
        x = self.embed_tokens(tokens) * self.config.embedding_scale
        positions = self._positions(tokens, x, before, packed)
        norm = self.layernorm_embedding
        if norm is None:
            x = x + positions
        elif self.decoder and self.config.family.embedding_norm == "before positions":
            x = norm(x) + positions
        else:
            x = norm(x + positions)
        x = self.dropout(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, i, mask, cache, packed)
        return x if self.layer_norm is None else self.layer_norm(x)

    def _positions(self, tokens: Tensor, x: Tensor, before: int, packed: PackedSequences | None) -> Tensor:
        """The embeddings of the tokens' positions, of x's dtype; `before` tokens of each row came in earlier steps."""
        family, pad = self.config.family, self.config.pad_id
        if packed is not None:
            places = packed.positions
        else:
            places = torch.arange(before, before + tokens.shape[1], device=tokens.device)
        if family.positions == "learned":
            return self.embed_positions(places + family.position_offset)
        if family.positions == "sinusoidal":
            return self.embed_positions(places, x)
        if packed is not None:
            return self.embed_positions(places + (pad + 1), x)
        text = tokens != pad  # padding has no position at all
        places = (text.cumsum(1) + before) * text + pad
        return self.embed_positions(places, x) * text[..., None]


class BartModel(nn.Module):
    """Encoder and decoder; `shared` is the embedding of both, where they have one."""

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size) if config.shared else None
        self.encoder = BartStack(config, decoder=False)
        self.decoder = BartStack(config, decoder=True)


class BartWithoutHead(EncoderDecoder):
    """Encoder, decoder and the embedding that they may share."""

    config_class = BartConfig
    prefix = "model."
    # Tables that are made anew, and what a fairseq checkpoint says of itself.
    ignored = re.compile(r"(model\.)?(encoder|decoder)\.(embed_positions\.(weight|weights|_float_tensor)|version)")
    transposed = None

    def __init__(self, config: BartConfig) -> None:
        super().__init__()
        self.config = config
        self.model = BartModel(config)
        self.tied: dict[str, str] = {}
        if config.shared:
            self.tied |= {f"model.{part}.embed_tokens.weight": "model.shared.weight" for part in ("encoder", "decoder")}
        self._tie()

    def _tie(self) -> None:
        for alias, name in self.tied.items():
            self.get_submodule(alias.removesuffix(".weight")).weight = self.get_parameter(name)

    def encode(
        self, tokens: Tensor, attention_mask: Tensor | None = None, packed: PackedSequences | None = None
    ) -> Tensor:
        return self.model.encoder(tokens, padding_mask(attention_mask), packed=packed)

    def decode(self, tokens: Tensor, cache: DecoderCache, packed: PackedSequences | None = None) -> Tensor:
        return self.model.decoder(tokens, cache.mask, cache, packed)

    def cross_attention(self) -> list[CrossAttention]:
        layers: Any = self.model.decoder.layers
        return [layer.encoder_attn for layer in layers]

    def shift_right(self, labels: Tensor) -> Tensor:
        """As the other encoder-decoders', but that of mBART and PLBart begins with the last token of each row, its language."""
        if not self.config.family.wraps_labels:
            return super().shift_right(labels)
        labels = labels.masked_fill(labels == -100, self.config.pad_id)
        last = (labels != self.config.pad_id).sum(1, keepdim=True) - 1
        return torch.cat([labels.gather(1, last), labels[:, :-1]], 1)


class Bart(BartWithoutHead):
    """BART, PLBart, mBART, PEGASUS, Marian, M2M-100 (NLLB) and BlenderBot, with Hugging Face's parameter names.

    Texts of up to max_positions tokens, sources and targets alike: ValueError beyond. In training no layers are dropped.
    """

    constants = re.compile(r"final_logits_bias")  # never trained, and zeros in a checkpoint without it

    def __init__(self, config: BartConfig) -> None:
        super().__init__(config)
        vocab = config.decoder_vocab_size
        self.final_logits_bias = (
            nn.Parameter(torch.zeros(1, vocab), requires_grad=False) if config.family.logits_bias else None
        )
        self.lm_head = nn.Linear(config.hidden_size, vocab, bias=False)
        if config.tied:
            head = f"model.{'shared' if config.shared else 'decoder.embed_tokens'}.weight"
            self.tied = {"lm_head.weight": head} | self.tied
            self._tie()

    @property
    def logits_bias(self) -> Tensor | None:
        return None if self.final_logits_bias is None else self.final_logits_bias[0]
