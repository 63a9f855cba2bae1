"""ModernBERT: an encoder with RoPE, windows in most layers, gated MLPs and norms before the blocks (Warner et al. 2024, 2412.13663)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.models.layers import LayerNorm, activation, need, split_heads
from foveate.models.rotary import Rotary
from foveate.models.sequences import PackedSequences, attend, check_positions
from foveate.ops.rotary import apply_rotary


@dataclass(frozen=True)
class ModernBertConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    windows: tuple[int | None, ...]  # of each layer: how far a token sees to each side; None: everything
    global_theta: float = 160000.0
    local_theta: float = 10000.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    decoder_bias: bool = True
    activation: str = "gelu"
    head_activation: str = "gelu"
    pooled_by: str = "cls"  # of the classification head: the first token, or the "mean"
    attention_dropout: float = 0.0
    num_labels: int = 2
    tied: bool = True

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModernBertConfig:
        hidden, heads, layers = (
            need(config, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")
        )
        if hidden % heads or (hidden // heads) % 2:
            raise CheckpointError(
                f"hidden_size={hidden} is not num_attention_heads={heads} times an even head dim, as RoPE needs"
            )
        every = config.get("global_attn_every_n_layers", 3)
        types = config.get("layer_types") or [
            "sliding_attention" if i % every else "full_attention" for i in range(layers)
        ]
        if len(types) != layers:
            raise CheckpointError(f"layer_types has {len(types)} entries for {layers} layers")
        side = config.get("local_attention", 128) // 2
        rope = config.get("rope_parameters") or {}
        both = [rope.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
        for one in both:
            if one.get("rope_type", "default") != "default":
                raise CheckpointError(f"rope_type {one['rope_type']!r} is not supported for modernbert; 'default' is")
        pooled = config.get("classifier_pooling", "cls")
        if pooled not in ("cls", "mean"):
            raise CheckpointError(f"classifier_pooling={pooled!r} is not one of cls, mean")
        return cls(
            vocab_size=need(config, "vocab_size"), hidden_size=hidden, intermediate_size=need(config, "intermediate_size"),
            num_layers=layers, num_heads=heads, max_positions=need(config, "max_position_embeddings"),
            windows=tuple(side if kind == "sliding_attention" else None for kind in types),
            global_theta=float(both[0].get("rope_theta") or config.get("global_rope_theta") or 160000.0),
            local_theta=float(both[1].get("rope_theta") or config.get("local_rope_theta") or 10000.0),
            norm_eps=config.get("norm_eps", 1e-5), norm_bias=bool(config.get("norm_bias")),
            attention_bias=bool(config.get("attention_bias")), mlp_bias=bool(config.get("mlp_bias")),
            head_bias=bool(config.get("classifier_bias")), decoder_bias=bool(config.get("decoder_bias", True)),
            activation=config.get("hidden_activation", "gelu"), head_activation=config.get("classifier_activation", "gelu"),
            pooled_by=pooled, attention_dropout=config.get("attention_dropout", 0.0),
            num_labels=len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2),
            tied=bool(config.get("tie_word_embeddings", True)),
        )  # fmt: skip


def _norm(config: ModernBertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)


class ModernBertAttention(nn.Module):
    def __init__(self, config: ModernBertConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.dropout_p, self.side = config.num_heads, config.attention_dropout, config.windows[layer]
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packed: PackedSequences | None, **options: Any) -> Tensor:
        q, k, v = (split_heads(y, self.heads) for y in self.Wqkv(x).chunk(3, -1))
        q, k = apply_rotary(q, k, cos, sin)
        if self.side is not None:
            options["window"] = (self.side, self.side)
        return self.Wo(
            attend(q, k, v, packed, dropout_p=self.dropout_p if self.training else 0.0, **options).flatten(2)
        )


class ModernBertLayer(nn.Module):
    def __init__(self, config: ModernBertConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = _norm(config) if layer else nn.Identity()  # the embedding has been normed
        self.attn = ModernBertAttention(config, layer)
        self.mlp_norm = _norm(config)
        # plain container for Hugging Face's names
        self.mlp = nn.ModuleDict({
            "Wi": nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias),
            "Wo": nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias),
        })  # fmt: skip
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, packed: PackedSequences | None, **options: Any) -> Tensor:
        x = x + self.attn(self.attn_norm(x), cos, sin, packed, **options)
        inner, gate = self.mlp["Wi"](self.mlp_norm(x)).chunk(2, -1)
        return x + self.mlp["Wo"](self.activation(inner) * gate)


class ModernBert(nn.Module):
    """The encoder, with Hugging Face's parameter names; called as `bert.Bert`, and token types are nothing to it."""

    config_class = ModernBertConfig
    prefix = "model."
    ignored = re.compile(r"(head|decoder|classifier)\..*|.*rotary_emb\..*")
    transposed = None

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.config = config
        self.tied: dict[str, str] = {}
        self.embeddings = nn.ModuleDict(
            {"tok_embeddings": nn.Embedding(config.vocab_size, config.hidden_size), "norm": _norm(config)}
        )
        self.layers = nn.ModuleList(ModernBertLayer(config, i) for i in range(config.num_layers))
        self.final_norm = _norm(config)
        D = config.hidden_size // config.num_heads
        self.rotary = Rotary(D, config.max_positions, config.global_theta)
        self.local_rotary = Rotary(D, config.max_positions, config.local_theta)

    def forward(
        self,
        tokens: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_lens: Tensor | None = None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """See `bert.Bert`. With kv_lens the padding is masked, so that windows count from the query's own place."""
        check_positions(tokens, packed, self.config.max_positions, "; cut the text into windows")
        options: dict[str, Any] = {}
        if kv_lens is not None:
            seen = torch.arange(tokens.shape[1], device=tokens.device) < kv_lens[:, None]
            attention_mask = seen if attention_mask is None else seen & attention_mask.bool()
        if attention_mask is not None:
            options["mask"] = attention_mask.bool()[:, None, None, :]
        if options and packed is not None:
            raise ValueError("packed sequences have no padding; omit attention_mask and kv_lens")
        x = self.embeddings["norm"](self.embeddings["tok_embeddings"](tokens))
        length = tokens.shape[1] if packed is None else packed.longest
        tables = []
        for rotary in (self.rotary, self.local_rotary):
            cos, sin = rotary.tables(x.device, x.dtype, length)
            at = slice(length) if packed is None else packed.positions
            tables.append((cos[at], sin[at]))
        for layer, window in zip(self.layers, self.config.windows):
            x = layer(x, *tables[window is not None], packed, **options)
        return self.final_norm(x)

    def pool(self, hidden: Tensor, packed: PackedSequences | None = None) -> Tensor:
        """There is no pooler beside the classification head."""
        raise ValueError("ModernBERT has no pooler; average the hidden states instead")


class ModernBertWithHead(nn.Module):
    config_class = ModernBertConfig
    prefix = "model."
    ignored = re.compile(r"(head|decoder|classifier)\..*|.*rotary_emb\..*")
    transposed = None

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        self.config = config
        self.tied: dict[str, str] = {}
        self.model = ModernBert(config)
        head = {
            "dense": nn.Linear(config.hidden_size, config.hidden_size, bias=config.head_bias),
            "norm": _norm(config),
        }
        self.head = nn.ModuleDict(head)
        self.activation = activation(config.head_activation)

    @property
    def bert(self) -> ModernBert:
        """The encoder, by the name that the pipelines know."""
        return self.model

    def transform(self, hidden: Tensor) -> Tensor:
        return self.head["norm"](self.activation(self.head["dense"](hidden)))


class ModernBertForMaskedLM(ModernBertWithHead):
    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=config.decoder_bias)
        self.tied = {"decoder.weight": "model.embeddings.tok_embeddings.weight"} if config.tied else {}

    def forward(self, tokens: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
        """As ModernBert's; returns logits [B, S, vocab]."""
        return self.logits(self.model(tokens, *args, **options))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]"""
        return self.decoder(self.transform(hidden))


class ModernBertForSequenceClassification(ModernBertWithHead):
    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self, tokens: Tensor, *args: Tensor | None, packed: PackedSequences | None = None, **options: Tensor | None
    ) -> Tensor:
        """As ModernBert's; returns logits [B, num_labels], B being the sequences if they are packed."""
        hidden = self.model(tokens, *args, packed=packed, **options)
        return self.classifier(self.transform(self._pooled(hidden, packed, **options)))

    def _pooled(
        self,
        hidden: Tensor,
        packed: PackedSequences | None,
        attention_mask: Tensor | None = None,
        kv_lens: Tensor | None = None,
    ) -> Tensor:
        if self.config.pooled_by == "cls":
            return hidden[:, 0] if packed is None else hidden[0, packed.starts]
        if packed is not None:
            parts = hidden[0].split(packed.cu_seqlens.diff().tolist())
            return torch.stack([part.mean(0) for part in parts])
        seen = torch.ones(hidden.shape[:2], device=hidden.device) if attention_mask is None else attention_mask.float()
        if kv_lens is not None:
            seen = seen * (torch.arange(hidden.shape[1], device=hidden.device) < kv_lens[:, None])
        seen = seen.to(hidden.dtype)
        return (hidden * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)


class ModernBertForTokenClassification(ModernBertWithHead):
    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, tokens: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
        """As ModernBert's; returns logits [B, S, num_labels]."""
        return self.classifier(self.transform(self.model(tokens, *args, **options)))


class ModernBertForQuestionAnswering(ModernBertForTokenClassification):
    def forward(self, tokens: Tensor, *args: Tensor | None, **options: Any) -> Any:
        """As ModernBert's; returns the logits of an answer's start and end at each token, [B, S] each."""
        start, end = super().forward(tokens, *args, **options).unbind(-1)
        return start, end


HEADS: dict[str, type[nn.Module]] = {
    "encoder": ModernBert,
    "masked-lm": ModernBertForMaskedLM,
    "sequence-classification": ModernBertForSequenceClassification,
    "token-classification": ModernBertForTokenClassification,
    "question-answering": ModernBertForQuestionAnswering,
}
NAMED_HEADS: dict[str, type[nn.Module]] = {
    "ModernBertModel": ModernBert,
    **{kind.__name__: kind for kind in HEADS.values() if kind is not ModernBert},
}
