"""The encoder families, each once: how a checkpoint of it differs from BERT in its config and in the names of its weights.

All run through `bert.Bert` and its heads. A family with a block of its own would be a module beside bert.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from foveate.files.checked import CheckpointError

Config = Mapping[str, Any]


@dataclass(frozen=True)
class EncoderFamily:
    """classes: what transformers' classes of the family begin with, such as "Roberta" of RobertaForMaskedLM.

    names: (pattern, replacement) for `re.sub`, applied in this order to the name of each stored weight, giving BERT's.
    keys: config.json's key -> the one that BERT has for it. knobs: fields of BertConfig that the family sets, from its config.
    """

    classes: str
    names: tuple[tuple[str, str], ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    knobs: Callable[[Config], dict[str, Any]] = lambda config: {}


def _positions_after_padding(config: Config) -> dict[str, Any]:
    """RoBERTa counts positions from pad_token_id + 1 on, and padding has the position pad_token_id."""
    pad = config.get("pad_token_id")
    return {"pad_id": 1 if pad is None else pad}


def _albert(config: Config) -> dict[str, Any]:
    if config.get("inner_group_num", 1) != 1:
        raise CheckpointError(
            f"inner_group_num={config['inner_group_num']} is not supported for ALBERT; all published models have 1"
        )
    groups, layers = config.get("num_hidden_groups", 1), config.get("num_hidden_layers", 12)
    if not 1 <= groups <= layers:
        raise CheckpointError(
            f"num_hidden_groups={groups} must be between 1 and num_hidden_layers={layers}; take the config of these weights"
        )
    return {
        "stored_layers": groups,
        "embedding_size": config.get("embedding_size", 128),
        "activation": config.get("hidden_act", "gelu_new"),
        "project_embeddings": True,
        "classifier_dropout": config.get("classifier_dropout_prob", 0.1),
        "dropout": config.get("hidden_dropout_prob", 0.0),
        "attention_dropout": config.get("attention_probs_dropout_prob", 0.0),
    }


def _electra(config: Config) -> dict[str, Any]:
    narrow, hidden = config.get("embedding_size", 128), config.get("hidden_size", 256)
    return {
        "embedding_size": narrow,
        "project_embeddings": narrow != hidden,
        "pooled_by": "gelu",
        "head_activation": "gelu",
    }


_LM_HEAD = (
    (r"^lm_head\.dense\.", "cls.predictions.transform.dense."),
    (r"^lm_head\.layer_norm\.", "cls.predictions.transform.LayerNorm."),
    (r"^lm_head\.", "cls.predictions."),
)
# The classification head has the pooler in it.
_CLASSIFIER = ((r"^classifier\.dense\.", "bert.pooler.dense."), (r"^classifier\.out_proj\.", "classifier."))
_ROBERTA = ((r"^(roberta|camembert|xlm_roberta)\.", "bert."), *_LM_HEAD, *_CLASSIFIER)


def _roberta(classes: str) -> EncoderFamily:
    def knobs(config: Config) -> dict[str, Any]:
        return _positions_after_padding(config) | {"head_activation": "gelu"}

    return EncoderFamily(classes, _ROBERTA, knobs=knobs)


FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily("Bert"),
    "roberta": _roberta("Roberta"),
    "xlm-roberta": _roberta("XLMRoberta"),
    "camembert": _roberta("Camembert"),
    "distilbert": EncoderFamily(
        "DistilBert",
        (
            (r"^distilbert\.", "bert."),
            (r"\btransformer\.layer\.", "encoder.layer."),
            (r"\.attention\.q_lin\.", ".attention.self.query."),
            (r"\.attention\.k_lin\.", ".attention.self.key."),
            (r"\.attention\.v_lin\.", ".attention.self.value."),
            (r"\.attention\.out_lin\.", ".attention.output.dense."),
            (r"\.sa_layer_norm\.", ".attention.output.LayerNorm."),
            (r"\.ffn\.lin1\.", ".intermediate.dense."),
            (r"\.ffn\.lin2\.", ".output.dense."),
            (r"\.output_layer_norm\.", ".output.LayerNorm."),
            (r"^vocab_transform\.", "cls.predictions.transform.dense."),
            (r"^vocab_layer_norm\.", "cls.predictions.transform.LayerNorm."),
            (r"^vocab_projector\.", "cls.predictions.decoder."),
            (r"^pre_classifier\.", "bert.pooler.dense."),
        ),
        keys={
            "dim": "hidden_size",
            "hidden_dim": "intermediate_size",
            "n_layers": "num_hidden_layers",
            "n_heads": "num_attention_heads",
            "activation": "hidden_act",
            "dropout": "hidden_dropout_prob",
            "attention_dropout": "attention_probs_dropout_prob",
            "seq_classif_dropout": "classifier_dropout",
        },
        knobs=lambda config: {"token_types": 0, "pooled_by": "relu"},
    ),
    "mpnet": EncoderFamily(
        "MPNet",
        (
            (r"^mpnet\.", "bert."),
            (r"\.attention\.attn\.q\.", ".attention.self.query."),
            (r"\.attention\.attn\.k\.", ".attention.self.key."),
            (r"\.attention\.attn\.v\.", ".attention.self.value."),
            (r"\.attention\.attn\.o\.", ".attention.output.dense."),
            (r"\.attention\.LayerNorm\.", ".attention.output.LayerNorm."),
            *_LM_HEAD,
            *_CLASSIFIER,
        ),
        knobs=lambda config: {
            "token_types": 0,
            "pad_id": 1,
            "head_activation": "gelu",
            "relative_buckets": config.get("relative_attention_num_buckets", 32),
        },
    ),
    "electra": EncoderFamily(
        "Electra",
        (
            (r"^electra\.", "bert."),
            (r"\bembeddings_project\.", "embeddings.projection."),
            (r"^generator_predictions\.", "cls.predictions.transform."),
            (r"^generator_lm_head\.", "cls.predictions.decoder."),
            *_CLASSIFIER,
        ),
        knobs=_electra,
    ),
    "albert": EncoderFamily(
        "Albert",
        (
            (r"^albert\.", "bert."),
            (r"\bencoder\.embedding_hidden_mapping_in\.", "embeddings.projection."),
            (r"\.albert_layer_groups\.(\d+)\.albert_layers\.0\.", r".layer.\1."),
            (r"\.attention\.(query|key|value)\.", r".attention.self.\1."),
            (r"\.attention\.(dense|LayerNorm)\.", r".attention.output.\1."),
            (r"\.ffn\.", ".intermediate.dense."),
            (r"\.ffn_output\.", ".output.dense."),
            (r"\.full_layer_layer_norm\.", ".output.LayerNorm."),
            (r"\bpooler\.(weight|bias)$", r"pooler.dense.\1"),
            (r"^predictions\.(dense|LayerNorm)\.", r"cls.predictions.transform.\1."),
            (r"^predictions\.", "cls.predictions."),
        ),
        knobs=_albert,
    ),
}
