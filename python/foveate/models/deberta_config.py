"""What a DeBERTa's config.json says, of versions 1 to 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.files.checked import CheckpointError
from foveate.models.bert import BertConfig

_TERMS = ("c2p", "p2c")


@dataclass(frozen=True)
class DebertaConfig(BertConfig):
    """BERT's, and what disentangled attention has beside it. token_types may be 0, as in version 3."""

    absolute_positions: bool = True  # a table of positions is added to the tokens
    terms: tuple[str, ...] = ()  # "c2p": a query looks at positions, "p2c": positions look at a key
    score_terms: int = 1  # sums of products that a score has, by which it is scaled
    max_relative: int = 0  # distances are told apart up to this one; 0: there are no relative positions
    buckets: int = 0  # of distances to each side, exact for the near half and logarithmic beyond; 0: each its own
    shared_projections: bool = False  # positions go through the projections of keys and queries
    normed_positions: bool = False
    key_bias: bool = True  # version 1 has none, and none of positions as keys
    conv_kernel: int = 0  # of the convolution beside the first layer; 0: none
    conv_groups: int = 1
    conv_activation: str = "tanh"
    legacy_head: bool = True  # of masked-LM: transformers' first one, which is not that of the published weights
    pooler_dropout: float = 0.0

    @property
    def span(self) -> int:
        """Rows of the table of positions to each side."""
        return self.buckets or self.max_relative

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> DebertaConfig:
        base = {"layer_norm_eps": 1e-7, "type_vocab_size": 0, **config}
        bert = BertConfig.from_hf({**base, "model_type": "bert"})
        first = config.get("model_type") == "deberta"
        heads, hidden = bert.num_heads, bert.hidden_size
        relative = bool(config.get("relative_attention", False))
        named = _terms(config.get("pos_att_type"))
        max_relative = config.get("max_relative_positions", -1)
        conv = _conv_kernel(config)
        if config.get("talking_head"):
            raise CheckpointError("talking_head is not supported for DeBERTa; no published model has it")
        if config.get("pooler_hidden_size", hidden) != hidden:
            raise CheckpointError(
                f"pooler_hidden_size={config['pooler_hidden_size']} must be hidden_size={hidden}, which the pooler reads"
            )
        if config.get("attention_head_size", hidden // heads) != hidden // heads:
            raise CheckpointError(
                f"attention_head_size={config['attention_head_size']} must be {hidden // heads}, hidden_size over num_attention_heads"
            )
        dropout = config.get("cls_dropout")
        size = config.get("embedding_size", hidden)
        legacy = bool(config.get("legacy", True))
        if not legacy and size != hidden:
            raise CheckpointError(
                f"embedding_size={size} must be hidden_size={hidden} for the masked-LM head of legacy=false, which the embedding follows"
            )
        return cls(
            **vars(bert) | {
                "classifier_dropout": bert.dropout if dropout is None else dropout,
                "embedding_size": size,
                "project_embeddings": size != hidden,
                "pooled_by": config.get("pooler_hidden_act", "gelu"),
            },
            absolute_positions=bool(config.get("position_biased_input", True)),
            terms=named if relative else (),
            score_terms=1 + len(named),
            max_relative=(max_relative if max_relative > 0 else bert.max_positions) if relative else 0,
            buckets=0 if first else max(config.get("position_buckets", -1), 0),
            shared_projections=not first and bool(config.get("share_att_key")),
            normed_positions=not first and "layer_norm" in [part.strip() for part in config.get("norm_rel_ebd", "none").lower().split("|")],
            key_bias=not first,
            conv_kernel=0 if first else conv,
            conv_groups=config.get("conv_groups", 1),
            conv_activation=config.get("conv_act", "tanh"),
            legacy_head=legacy,
            pooler_dropout=config.get("pooler_dropout", 0.0),
        )  # fmt: skip


def _terms(value: Any) -> tuple[str, ...]:
    names = [part.strip() for part in value.lower().split("|")] if isinstance(value, str) else list(value or ())
    unknown = sorted(set(names) - {*_TERMS, "none", ""})
    if unknown:
        raise CheckpointError(f"pos_att_type has {', '.join(map(repr, unknown))}; known are {', '.join(_TERMS)}")
    return tuple(term for term in _TERMS if term in names)


def _conv_kernel(config: dict[str, Any]) -> int:
    kernel = config.get("conv_kernel_size", 0)
    if kernel and kernel % 2 == 0:
        raise CheckpointError(f"conv_kernel_size={kernel} must be odd, so that the text keeps its length")
    groups, hidden = config.get("conv_groups", 1), config["hidden_size"]
    if kernel and hidden % groups:
        raise CheckpointError(f"hidden_size={hidden} is not a multiple of conv_groups={groups}")
    return kernel
