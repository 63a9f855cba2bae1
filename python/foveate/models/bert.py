"""BERT and its kin (encoder_families.py): the encoder, and heads for masked-LM, classification and question answering."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.models.encoder_families import FAMILIES
from foveate.models.layers import activation, gated, need, split_heads
from foveate.models.recompute import feed
from foveate.models.rotary import Rotary
from foveate.models.sequences import PackedSequences, attend, check_positions
from foveate.ops.attention.relative_bias import RelativeBias
from foveate.ops.rotary import apply_rotary

# Constants that old checkpoints store, and parts that a model with another head does not use.
_IGNORED = re.compile(
    r"(bert\.)?embeddings\.(position_ids|token_type_ids)|(bert\.)?pooler\..*|(cls|classifier|qa_outputs|sop_classifier|"
    r"discriminator_predictions)\..*|.*rotary_emb\..*"
)


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int  # of a text, the offset not counted
    token_types: int = 2  # 0: none
    norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.0  # of embeddings and layers, in training mode
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    num_labels: int = 2  # of the sequence classification head
    tied: bool = True  # the masked-LM head is the embedding
    embedding_size: int = 0  # of the tables of the embedding; 0: hidden_size
    project_embeddings: bool = False  # ELECTRA, ALBERT: from there to hidden_size
    pad_id: int | None = None  # RoBERTa, MPNet: positions begin at pad_id + 1, and padding has the position pad_id
    stored_layers: int = (
        0  # ALBERT: distinct layers, each used num_layers / stored_layers times in a row; 0: num_layers
    )
    relative_buckets: int = 0  # MPNet: T5's bias of relative positions, beside the positions
    pooled_by: str = "tanh"  # what follows the pooler's linear layer
    head_activation: str = ""  # of the masked-LM head; "": activation
    rotary_theta: float = 0.0  # NomicBERT: positions turn queries and keys instead of being added; 0: they are added
    rotary_interleaved: bool = False
    gated: bool = False  # the MLP is activation(gate(x)) * dense(x)
    bias: bool = True  # of the layers' linear layers

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> BertConfig:
        family = FAMILIES[config.get("model_type", "bert")]
        config = {family.keys.get(key, key): value for key, value in config.items()}
        hidden, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
        if hidden % heads:
            raise CheckpointError(f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}")
        if config.get("position_embedding_type", "absolute") != "absolute":
            raise CheckpointError(f"position_embedding_type={config['position_embedding_type']!r} is not supported")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise CheckpointError(
                "BERT as a decoder (is_decoder, add_cross_attention) is not supported; only the encoder is"
            )
        dropout = config.get("hidden_dropout_prob", 0.1)
        classifier_dropout = config.get("classifier_dropout")
        fields: dict[str, Any] = {
            "vocab_size": need(config, "vocab_size"),
            "hidden_size": hidden,
            "intermediate_size": need(config, "intermediate_size"),
            "num_layers": need(config, "num_hidden_layers"),
            "num_heads": heads,
            "max_positions": need(config, "max_position_embeddings"),
            "token_types": config.get("type_vocab_size", 2),
            "norm_eps": config.get("layer_norm_eps", 1e-12),
            "activation": config.get("hidden_act", "gelu"),
            "dropout": dropout,
            "attention_dropout": config.get("attention_probs_dropout_prob", 0.1),
            "classifier_dropout": dropout if classifier_dropout is None else classifier_dropout,
            "num_labels": len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2),
            "tied": bool(config.get("tie_word_embeddings", True)),
        } | family.knobs(config)
        if fields.get("pad_id") is not None:
            fields["max_positions"] -= fields["pad_id"] + 1
            if fields["max_positions"] < 1:
                raise CheckpointError(
                    f"max_position_embeddings={config['max_position_embeddings']} leaves no position after pad_token_id="
                    f"{fields['pad_id']}, where this {config['model_type']} begins to count; take the config of these weights"
                )
        return cls(**fields)

    @property
    def position_rows(self) -> int:
        return self.max_positions + (0 if self.pad_id is None else self.pad_id + 1)


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.pad_id = config.pad_id
        size = config.embedding_size or config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = None if config.rotary_theta else nn.Embedding(config.position_rows, size)
        self.token_type_embeddings = nn.Embedding(config.token_types, size) if config.token_types else None
        self.LayerNorm = nn.LayerNorm(size, eps=config.norm_eps)
        self.projection = nn.Linear(size, config.hidden_size) if config.project_embeddings else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, token_type_ids: Tensor | None, packed: PackedSequences | None) -> Tensor:
        x = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            x = x + self.position_embeddings(self._positions(tokens, packed))
        if self.token_type_embeddings is not None:
            # a model with one type has not learned to tell the texts of a pair apart by it
            alone = token_type_ids is None or self.token_type_embeddings.num_embeddings == 1
            x = x + self.token_type_embeddings(torch.zeros_like(tokens) if alone else token_type_ids)
        x = self.dropout(self.LayerNorm(x))
        return x if self.projection is None else self.projection(x)

    def _positions(self, tokens: Tensor, packed: PackedSequences | None) -> Tensor:
        if packed is not None:
            return packed.positions if self.pad_id is None else packed.positions + (self.pad_id + 1)
        if self.pad_id is None:
            return torch.arange(tokens.shape[1], device=tokens.device)
        text = tokens != self.pad_id
        return text.cumsum(1) * text + self.pad_id


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.dropout_p = config.num_heads, config.attention_dropout
        self.interleaved = config.rotary_interleaved
        self.query = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.key = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        packed: PackedSequences | None,
        rotary: tuple[Tensor, Tensor] | None = None,
        **padding: Any,
    ) -> Tensor:
        """rotary: cos and sin of the tokens' positions."""
        q, k, v = (split_heads(projection(x), self.heads) for projection in (self.query, self.key, self.value))
        if rotary is not None:
            q, k = apply_rotary(q, k, *rotary, interleaved=self.interleaved)
        dropout_p = self.dropout_p if self.training else 0.0
        return attend(q, k, v, packed, dropout_p=dropout_p, **padding).flatten(2)


class BertOutput(nn.Module):
    """LayerNorm(dense(x) + residual): BERT's norms come after each block."""

    def __init__(self, inner: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size, bias=config.bias)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, residual: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """function: to be applied to x first."""
        x = self.dense(x) if function is None else feed(self.dense, function, x)
        return self.LayerNorm(self.dropout(x) + residual)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # plain containers for Hugging Face's names: attention.self, attention.output, intermediate.dense
        self.attention = nn.ModuleDict(
            {"self": BertSelfAttention(config), "output": BertOutput(config.hidden_size, config)}
        )
        inner = config.intermediate_size
        names = ("dense", "gate") if config.gated else ("dense",)
        self.intermediate = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, inner, bias=config.bias) for name in names}
        )
        self.output = BertOutput(inner, config)
        self.activation = activation(config.activation)
        self.gated = config.gated

    def forward(self, x: Tensor, packed: PackedSequences | None, **padding: Any) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, packed, **padding), x)
        inner = self.intermediate["dense"](x)
        if self.gated:
            return self.output(gated(self.activation, self.intermediate["gate"](x), inner), x)
        return self.output(inner, x, self.activation)


class Bert(nn.Module):
    """The encoder (Devlin et al. 2018, arXiv 1810.04805), with Hugging Face's parameter names."""

    config_class = BertConfig
    prefix = "bert."
    ignored = _IGNORED
    transposed = None
    optional = ("pooler",)  # checkpoints of masked-LM and question answering have none

    def __init__(self, config: BertConfig, pooler: bool = True) -> None:
        super().__init__()
        self.config = config
        self.tied: dict[str, str] = {}
        self.embeddings = BertEmbeddings(config)
        layers = config.stored_layers or config.num_layers
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(config) for _ in range(layers))})
        if config.relative_buckets:
            self.encoder["relative_attention_bias"] = nn.Embedding(config.relative_buckets, config.num_heads)
        self.rotary: Rotary | None = None
        if config.rotary_theta:
            self.rotary = Rotary(config.hidden_size // config.num_heads, config.max_positions, config.rotary_theta)
        self.pooler: nn.ModuleDict | None = None
        if pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(
        self,
        tokens: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_lens: Tensor | None = None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """tokens int64 [B, S] -> [B, S, hidden].

        token_type_ids: int64 [B, S], zeros if None. Padding: attention_mask [B, S], not 0 where there is text, anywhere; or
        kv_lens int32 [B] for padding on the right, which is faster. The outputs at padding mean nothing. packed: tokens
        [1, total] are several sequences without padding, which is fastest.
        """
        check_positions(tokens, packed, self.config.max_positions, "; cut the text into windows")
        options: dict[str, Any] = {} if kv_lens is None else {"kv_lens": kv_lens}
        if attention_mask is not None:
            options["mask"] = attention_mask.bool()[:, None, None, :]
        if options and packed is not None:
            raise ValueError("packed sequences have no padding; omit attention_mask and kv_lens")
        encoder: Any = self.encoder
        if self.config.relative_buckets:
            if (
                kv_lens is not None
            ):  # a relative bias counts from the last key that there is, not from the last of the row
                keys = torch.arange(tokens.shape[1], device=tokens.device)
                options = {"mask": (keys < kv_lens[:, None])[:, None, None, :] & options.get("mask", True)}
            options["relative_bias"] = RelativeBias(encoder["relative_attention_bias"].weight)
        x = self.embeddings(tokens, token_type_ids, packed)
        if self.rotary is not None:
            length = tokens.shape[1] if packed is None else packed.longest
            cos, sin = self.rotary.tables(x.device, x.dtype, length)
            at = slice(length) if packed is None else packed.positions
            options["rotary"] = (cos[at], sin[at])
        layers = encoder["layer"]
        for i in range(self.config.num_layers):
            x = layers[i * len(layers) // self.config.num_layers](x, packed, **options)
        return x

    def pool(self, hidden: Tensor, packed: PackedSequences | None = None) -> Tensor:
        """activation(dense(hidden at the first token)): [B, S, hidden] -> [B, hidden], B being the sequences if they are packed.

        activation: tanh, but what the classification heads of ELECTRA (gelu) and DistilBERT (relu) have.
        """
        if self.pooler is None:
            raise ValueError("this checkpoint has no pooler; average the hidden states instead")
        first = hidden[:, 0] if packed is None else hidden[0, packed.starts]
        return activation(self.config.pooled_by)(self.pooler["dense"](first))


class BertWithHead(nn.Module):
    config_class = BertConfig
    prefix = "bert."
    ignored = _IGNORED
    transposed = None

    def __init__(self, config: BertConfig, pooler: bool = False) -> None:
        super().__init__()
        self.config = config
        self.tied: dict[str, str] = {}
        self.bert = Bert(config, pooler)

    def pool(self, hidden: Tensor, packed: PackedSequences | None = None) -> Tensor:
        """What a head of whole texts reads, see `Bert.pool`."""
        return self.bert.pool(hidden, packed)


class BertForMaskedLM(BertWithHead):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        hidden, vocab = config.hidden_size, config.vocab_size
        size = config.embedding_size or hidden
        transform = {"dense": nn.Linear(hidden, size), "LayerNorm": nn.LayerNorm(size, eps=config.norm_eps)}
        self.cls = nn.ModuleDict({
            "predictions": nn.ModuleDict({"transform": nn.ModuleDict(transform), "decoder": nn.Linear(size, vocab)})
        })  # fmt: skip
        # Stored twice, the second time as the bias of the decoder.
        self.cls["predictions"].bias = nn.Parameter(torch.zeros(vocab))
        self.tied = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
        if config.tied:
            self.tied["cls.predictions.decoder.weight"] = f"{self.prefix}embeddings.word_embeddings.weight"
        self.activation = activation(config.head_activation or config.activation)

    def forward(self, tokens: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
        """As Bert's; returns logits [B, S, vocab]."""
        return self.logits(self.bert(tokens, *args, **options))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]; pick the masked positions first, and this costs little."""
        return self.decoder(self.transform(hidden))

    @property
    def decoder(self) -> nn.Module:
        """The linear layer that gives the logits."""
        predictions: Any = self.cls["predictions"]
        return predictions["decoder"]

    def transform(self, hidden: Tensor) -> Tensor:
        """What the decoder, a linear layer, is applied to: [..., hidden] -> [..., hidden]."""
        predictions: Any = self.cls["predictions"]
        transform = predictions["transform"]
        return transform["LayerNorm"](self.activation(transform["dense"](hidden)))


class BertForSequenceClassification(BertWithHead):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, pooler=True)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(
        self, tokens: Tensor, *args: Tensor | None, packed: PackedSequences | None = None, **options: Tensor | None
    ) -> Tensor:
        """As Bert's; returns logits [B, num_labels], B being the sequences if they are packed."""
        hidden = self.bert(tokens, *args, packed=packed, **options)
        return self.classifier(self.dropout(self.pool(hidden, packed)))


class BertForMultipleChoice(BertForSequenceClassification):
    """Gives each of several texts a score; the best is the choice."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(dataclasses.replace(config, num_labels=1))

    def forward(
        self, tokens: Tensor, *args: Tensor | None, packed: PackedSequences | None = None, **options: Tensor | None
    ) -> Tensor:
        """As Bert's, of int64 [B, choices, S], other tensors likewise; returns logits [B, choices], or [choices] of packed ones."""
        if packed is not None:
            return super().forward(tokens, *args, packed=packed, **options)[:, 0]
        flat = [None if arg is None else arg.flatten(0, 1) for arg in (tokens, *args)]
        named = {name: None if arg is None else arg.flatten(0, 1) for name, arg in options.items()}
        return super().forward(*flat, **named).view(tokens.shape[:2])  # type: ignore[arg-type]


class BertForQuestionAnswering(BertWithHead):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def forward(self, tokens: Tensor, *args: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        """As Bert's; returns the logits of an answer's start and end at each token, [B, S] each."""
        start, end = self.qa_outputs(self.bert(tokens, *args, **options)).unbind(-1)
        return start, end


class BertForTokenClassification(BertWithHead):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, tokens: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
        """As Bert's; returns logits [B, S, num_labels]."""
        return self.classifier(self.dropout(self.bert(tokens, *args, **options)))


class BertForReplacedTokens(BertWithHead):
    """ELECTRA's discriminator (Clark et al. 2020, arXiv 2003.10555)."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        parts = {
            "dense": nn.Linear(config.hidden_size, config.hidden_size),
            "dense_prediction": nn.Linear(config.hidden_size, 1),
        }
        self.discriminator_predictions = nn.ModuleDict(parts)
        self.activation = activation(config.activation)

    def forward(self, tokens: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
        """As Bert's; returns logits [B, S]: above 0 for a token that is not the text's own."""
        head = self.discriminator_predictions
        hidden = self.activation(head["dense"](self.bert(tokens, *args, **options)))
        return head["dense_prediction"](hidden)[..., 0]


HEADS: dict[str, type[nn.Module]] = {
    "encoder": Bert,
    "masked-lm": BertForMaskedLM,
    "sequence-classification": BertForSequenceClassification,
    "token-classification": BertForTokenClassification,
    "multiple-choice": BertForMultipleChoice,
    "question-answering": BertForQuestionAnswering,
}
_PRETRAINED: dict[str, type[nn.Module]] = {
    "bert": BertForMaskedLM, "albert": BertForMaskedLM, "electra": BertForReplacedTokens,
}  # fmt: skip


def named_heads(model_type: str) -> dict[str, type[nn.Module]]:
    """What `architectures` of a config.json of this family may name. Pre-training has the masked-LM head and one that nothing uses."""
    classes = FAMILIES[model_type].classes
    known = {f"{classes}{kind.__name__.removeprefix('Bert')}": kind for kind in HEADS.values() if kind is not Bert}
    pretrained = {f"{classes}ForPreTraining": _PRETRAINED[model_type]} if model_type in _PRETRAINED else {}
    return {f"{classes}Model": Bert, **pretrained, **known}
