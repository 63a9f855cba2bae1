"""DeBERTa, versions 1 to 3 (He et al. 2020, arXiv 2006.03654, and 2021, arXiv 2111.09543): the encoder and its heads."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models import bert
from foveate.models.bert import BertOutput
from foveate.models.deberta_config import DebertaConfig
from foveate.models.disentangled import DisentangledAttention, Sequences
from foveate.models.layers import activation
from foveate.models.sequences import PackedSequences, check_positions

_IGNORED = re.compile(
    r"(deberta\.)?embeddings\.(position_ids|position_embeddings\..*)|pooler\..*|"
    r"(cls|classifier|qa_outputs|lm_predictions|mask_predictions|lm_head)\..*"
)


class DebertaEmbeddings(nn.Module):
    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        size = config.embedding_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size)
        self.position_embeddings = nn.Embedding(config.max_positions, size) if config.absolute_positions else None
        self.token_type_embeddings = nn.Embedding(config.token_types, size) if config.token_types else None
        self.embed_proj = nn.Linear(size, config.hidden_size, bias=False) if config.project_embeddings else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, token_type_ids: Tensor | None, packed: PackedSequences | None) -> Tensor:
        x = self.word_embeddings(tokens)
        if self.position_embeddings is not None:
            places = torch.arange(tokens.shape[1], device=tokens.device) if packed is None else packed.positions
            x = x + self.position_embeddings(places)
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings(torch.zeros_like(tokens) if token_type_ids is None else token_type_ids)
        if self.embed_proj is not None:
            x = self.embed_proj(x)
        return self.dropout(self.LayerNorm(x))


class DebertaLayer(nn.Module):
    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        # plain containers for Hugging Face's names
        self.attention = nn.ModuleDict(
            {"self": DisentangledAttention(config), "output": BertOutput(config.hidden_size, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = BertOutput(config.intermediate_size, config)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, sequences: Sequences, positions: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, sequences, positions), x)
        return self.output(self.intermediate["dense"](x), x, self.activation)


class NearbyTokens(nn.Module):
    """The convolution over the embeddings that version 2 has beside its first layer: LayerNorm(out + f(conv(x)))."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        hidden, kernel = config.hidden_size, config.conv_kernel
        self.conv = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=config.conv_groups)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = activation(config.conv_activation)

    def forward(self, x: Tensor, out: Tensor, sequences: Sequences) -> Tensor:
        """x: the embeddings, out: what the first layer made of them, [B, S, hidden] each."""
        parts = []
        for group in sequences.groups:
            part = group.of(x)
            if group.inside is not None:
                part = part * group.inside[..., None]
            parts.append(self.conv(part.transpose(1, 2)).transpose(1, 2))
        return self.LayerNorm(out + self.activation(self.dropout(sequences.join(parts))))


class DebertaEncoder(nn.Module):
    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(DebertaLayer(config) for _ in range(config.num_layers))
        relative = config.max_relative > 0
        self.rel_embeddings = nn.Embedding(2 * config.span, config.hidden_size) if relative else None
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if config.normed_positions else None
        self.conv = NearbyTokens(config) if config.conv_kernel else None

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        embeddings, positions = x, self._positions(sequences)
        for i, layer in enumerate(self.layer):
            x = layer(x, sequences, positions)
            if i == 0 and self.conv is not None:
                x = self.conv(embeddings, x, sequences)
        return x

    def _positions(self, sequences: Sequences) -> Tensor | None:
        """The rows of the table of distances that these sequences need, [rows, hidden]."""
        if self.rel_embeddings is None or sequences.used.stop == 0:
            return None
        rows = self.rel_embeddings.weight[sequences.used]
        return rows if self.LayerNorm is None else self.LayerNorm(rows)


class Deberta(nn.Module):
    """The encoder, with the names that transformers has for version 2; called as `bert.Bert`.

    Texts of any length where the config has no absolute positions, as in version 3: distances beyond the last are taken for it.
    """

    config_class = DebertaConfig
    prefix = "deberta."
    ignored = _IGNORED
    transposed = None

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        self.config = config
        self.tied: dict[str, str] = {}
        self.embeddings = DebertaEmbeddings(config)
        self.encoder = DebertaEncoder(config)

    def forward(
        self,
        tokens: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_lens: Tensor | None = None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """See `bert.Bert`. The scores of positions take S**2 numbers a head, of packed sequences for each by itself."""
        if self.config.absolute_positions:
            check_positions(tokens, packed, self.config.max_positions, "; cut the text into windows")
        options: dict[str, Any] = {} if kv_lens is None else {"kv_lens": kv_lens}
        inside = None
        if kv_lens is not None:
            inside = torch.arange(tokens.shape[1], device=tokens.device) < kv_lens[:, None]
        if attention_mask is not None:
            options["mask"] = attention_mask.bool()[:, None, None, :]
            inside = attention_mask.bool() if inside is None else inside & attention_mask.bool()
        if options and packed is not None:
            raise ValueError("packed sequences have no padding; omit attention_mask and kv_lens")
        x = self.embeddings(tokens, token_type_ids, packed)
        return self.encoder(x, Sequences(self.config, tokens, packed, inside, options))

    def pool(self, hidden: Tensor, packed: PackedSequences | None = None) -> Tensor:
        """There is no pooler beside the classification head."""
        raise ValueError("DeBERTa has no pooler; average the hidden states instead")


class DebertaWithHead(bert.BertWithHead):
    """Before a head of BERT's in a class's bases, it puts DeBERTa's encoder and pooler under it."""

    config: DebertaConfig
    config_class = DebertaConfig
    prefix = "deberta."
    ignored = _IGNORED

    def __init__(self, config: DebertaConfig, pooler: bool = False) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.tied = {}
        self.deberta = Deberta(config)
        self.pooler: nn.ModuleDict | None = None
        if pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
            self.pooler_dropout = nn.Dropout(config.pooler_dropout)

    @property
    def bert(self) -> Deberta:  # type: ignore[override]
        """The encoder, by the name that the pipelines know."""
        return self.deberta

    def pool(self, hidden: Tensor, packed: PackedSequences | None = None) -> Tensor:
        """activation(dense(hidden at the first token)): [B, S, hidden] -> [B, hidden], B being the sequences if they are packed."""
        if self.pooler is None:
            return self.deberta.pool(hidden, packed)
        first = hidden[:, 0] if packed is None else hidden[0, packed.starts]
        return activation(self.config.pooled_by)(self.pooler["dense"](self.pooler_dropout(first)))


class DebertaForMaskedLM(bert.BertForMaskedLM, DebertaWithHead):
    """With config.legacy_head BERT's head; else that of the published weights, whose decoder is the embedding."""

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__(config)
        if config.legacy_head:
            return
        del self.cls
        hidden, vocab = config.hidden_size, config.vocab_size
        head = nn.ModuleDict({
            "dense": nn.Linear(hidden, hidden),
            "LayerNorm": nn.LayerNorm(hidden, eps=config.norm_eps),
            "decoder": nn.Linear(hidden, vocab),
        })  # fmt: skip
        head.bias = nn.Parameter(torch.zeros(vocab))
        self.lm_predictions = nn.ModuleDict({"lm_head": head})
        self.tied = {
            "lm_predictions.lm_head.decoder.bias": "lm_predictions.lm_head.bias",
            "lm_predictions.lm_head.decoder.weight": "deberta.embeddings.word_embeddings.weight",
        }

    @property
    def decoder(self) -> nn.Module:
        if self.config.legacy_head:
            return super().decoder
        head: Any = self.lm_predictions["lm_head"]
        return head["decoder"]

    def transform(self, hidden: Tensor) -> Tensor:
        if self.config.legacy_head:
            return super().transform(hidden)
        head: Any = self.lm_predictions["lm_head"]
        return head["LayerNorm"](self.activation(head["dense"](hidden)))


class DebertaForSequenceClassification(bert.BertForSequenceClassification, DebertaWithHead):
    pass


class DebertaForMultipleChoice(bert.BertForMultipleChoice, DebertaWithHead):
    pass


class DebertaForTokenClassification(bert.BertForTokenClassification, DebertaWithHead):
    def __init__(self, config: DebertaConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(config.dropout)  # not cls_dropout


class DebertaForQuestionAnswering(bert.BertForQuestionAnswering, DebertaWithHead):
    pass


HEADS: dict[str, type[nn.Module]] = {
    "encoder": Deberta,
    "masked-lm": DebertaForMaskedLM,
    "sequence-classification": DebertaForSequenceClassification,
    "token-classification": DebertaForTokenClassification,
    "multiple-choice": DebertaForMultipleChoice,
    "question-answering": DebertaForQuestionAnswering,
}
# Version 1 has its projections under other names, and those of q, k and v in one matrix, a head's after the other's.
FIRST_NAMES = (
    (r"\.self\.q_bias$", ".self.query_proj.bias"),
    (r"\.self\.v_bias$", ".self.value_proj.bias"),
    (r"\.self\.pos_proj\.", ".self.pos_key_proj."),
    (r"\.self\.pos_q_proj\.", ".self.pos_query_proj."),
)
FIRST_FUSED = {"self.in_proj": "qkv_by_head"}


def named_heads(classes: str) -> dict[str, type[nn.Module]]:
    """What `architectures` of a config.json may name. classes: what the classes of this version begin with."""
    known = {
        f"{classes}{kind.__name__.removeprefix('Deberta')}": kind for kind in HEADS.values() if kind is not Deberta
    }
    return {f"{classes}Model": Deberta, **known}
