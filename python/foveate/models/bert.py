"""BERT: the encoder, and heads for masked-LM, sequence classification and question answering."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.models.layers import activation, need, split_heads
from foveate.models.recompute import feed
from foveate.models.sequences import PackedSequences, attend, check_positions

# Constants that old checkpoints store, and parts that a model with another head does not use.
_IGNORED = re.compile(
    r"(bert\.)?embeddings\.(position_ids|token_type_ids)|(bert\.)?pooler\..*|(cls|classifier|qa_outputs)\..*"
)


@dataclass(frozen=True)
class BertConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    token_types: int = 2
    norm_eps: float = 1e-12
    activation: str = "gelu"
    dropout: float = 0.0  # of embeddings and layers, in training mode
    attention_dropout: float = 0.0
    classifier_dropout: float = 0.0
    num_labels: int = 2  # of the sequence classification head
    tied: bool = True  # the masked-LM head is the embedding

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> BertConfig:
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
        return cls(
            vocab_size=need(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=need(config, "intermediate_size"),
            num_layers=need(config, "num_hidden_layers"),
            num_heads=heads,
            max_positions=need(config, "max_position_embeddings"),
            token_types=config.get("type_vocab_size", 2),
            norm_eps=config.get("layer_norm_eps", 1e-12),
            activation=config.get("hidden_act", "gelu"),
            dropout=dropout,
            attention_dropout=config.get("attention_probs_dropout_prob", 0.1),
            classifier_dropout=dropout if classifier_dropout is None else classifier_dropout,
            num_labels=len(config["id2label"]) if config.get("id2label") else config.get("num_labels", 2),
            tied=bool(config.get("tie_word_embeddings", True)),
        )


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, token_type_ids: Tensor | None, packed: PackedSequences | None) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device) if packed is None else packed.positions
        types = torch.zeros_like(tokens) if token_type_ids is None else token_type_ids
        x = self.word_embeddings(tokens) + self.token_type_embeddings(types) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(x))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads, self.dropout_p = config.num_heads, config.attention_dropout
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, packed: PackedSequences | None, **padding: Any) -> Tensor:
        q, k, v = (split_heads(projection(x), self.heads) for projection in (self.query, self.key, self.value))
        dropout_p = self.dropout_p if self.training else 0.0
        return attend(q, k, v, packed, dropout_p=dropout_p, **padding).flatten(2)


class BertOutput(nn.Module):
    """LayerNorm(dense(x) + residual): BERT's norms come after each block."""

    def __init__(self, inner: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, config.hidden_size)
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
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = BertOutput(config.intermediate_size, config)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, packed: PackedSequences | None, **padding: Any) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, packed, **padding), x)
        return self.output(self.intermediate["dense"](x), x, self.activation)


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
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer(config) for _ in range(config.num_layers))})
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
        padding = {} if kv_lens is None else {"kv_lens": kv_lens}
        if attention_mask is not None:
            padding["mask"] = attention_mask.bool()[:, None, None, :]
        if padding and packed is not None:
            raise ValueError("packed sequences have no padding; leave attention_mask and kv_lens away")
        x = self.embeddings(tokens, token_type_ids, packed)
        layers: Any = self.encoder["layer"]
        for layer in layers:
            x = layer(x, packed, **padding)
        return x

    def pool(self, hidden: Tensor, packed: PackedSequences | None = None) -> Tensor:
        """tanh(dense(hidden at the first token)): [B, S, hidden] -> [B, hidden], B being the sequences if they are packed."""
        if self.pooler is None:
            raise ValueError("this checkpoint has no pooler; average the hidden states instead")
        first = hidden[:, 0] if packed is None else hidden[0, packed.starts]
        return torch.tanh(self.pooler["dense"](first))


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


class BertForMaskedLM(BertWithHead):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        hidden, vocab = config.hidden_size, config.vocab_size
        transform = {"dense": nn.Linear(hidden, hidden), "LayerNorm": nn.LayerNorm(hidden, eps=config.norm_eps)}
        self.cls = nn.ModuleDict({
            "predictions": nn.ModuleDict({"transform": nn.ModuleDict(transform), "decoder": nn.Linear(hidden, vocab)})
        })  # fmt: skip
        # Stored twice, the second time as the bias of the decoder.
        self.cls["predictions"].bias = nn.Parameter(torch.zeros(vocab))
        self.tied = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
        if config.tied:
            self.tied["cls.predictions.decoder.weight"] = "bert.embeddings.word_embeddings.weight"
        self.activation = activation(config.activation)

    def forward(self, tokens: Tensor, *args: Tensor | None, **options: Any) -> Tensor:
        """As Bert's; returns logits [B, S, vocab]."""
        return self.logits(self.bert(tokens, *args, **options))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]; pick the masked positions first, and this costs little."""
        predictions: Any = self.cls["predictions"]
        return predictions["decoder"](self.transform(hidden))

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
        return self.classifier(self.dropout(self.bert.pool(hidden, packed)))


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


HEADS: dict[str, type[nn.Module]] = {
    "encoder": Bert,
    "masked-lm": BertForMaskedLM,
    "sequence-classification": BertForSequenceClassification,
    "token-classification": BertForTokenClassification,
    "question-answering": BertForQuestionAnswering,
}
# What `architectures` of a config.json may name. Pre-training has the masked-LM head and one for next sentences, which nothing uses.
ARCHITECTURES: dict[str, type[nn.Module]] = {
    "BertModel": Bert,
    "BertForPreTraining": BertForMaskedLM,
    **{cls.__name__: cls for name, cls in HEADS.items() if name != "encoder"},
}
CLASSIFIERS = ("BertForSequenceClassification", "BertForTokenClassification", "BertForMultipleChoice")
