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
    fused: stored modules that are several here, see `checkpoint/split.py`.
    """

    classes: str
    names: tuple[tuple[str, str], ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    knobs: Callable[[Config], dict[str, Any]] = lambda config: {}
    fused: Mapping[str, str] = field(default_factory=dict)


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


_NOMIC_KEYS = {
    "n_embd": "hidden_size", "n_head": "num_attention_heads", "n_inner": "intermediate_size", "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings", "layer_norm_epsilon": "layer_norm_eps", "resid_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
}  # fmt: skip


def _nomic(config: Config) -> dict[str, Any]:
    """The config of transformers, or that of the code beside the weights, which has names of GPT-2's."""
    wanted = {
        "prenorm": False, "parallel_block": False, "causal": False, "use_rms_norm": False, "num_experts": 0, "moe_every_n_layers": 0,
        "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "rotary_scaling_factor": None, "rotary_emb_scale_base": None,
        "rotary_emb_fraction": 1.0,
    }  # fmt: skip
    for key, value in wanted.items():
        if config.get(key) is not None and config[key] != value:
            raise CheckpointError(
                f"{key}={config[key]!r} is not supported for NomicBERT, which is {value!r} in nomic-embed-text-v1 and v1.5"
            )
    named = config.get("activation_function", "swiglu")
    if named not in ("swiglu", "geglu"):
        raise CheckpointError(f"activation_function={named!r} is not supported for NomicBERT; swiglu and geglu are")
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise CheckpointError(f"rope_type {rope['rope_type']!r} is not supported for nomic_bert; 'default' is")
    theta = rope.get("rope_theta") or config.get("rope_theta") or config.get("rotary_emb_base") or 1000.0
    return {
        "rotary_theta": float(theta), "rotary_interleaved": bool(config.get("rotary_emb_interleaved")), "gated": True, "bias": False,
        "activation": config.get("hidden_act", "silu" if named == "swiglu" else "gelu"),
        "dropout": config.get("hidden_dropout_prob", 0.0), "attention_dropout": config.get("attention_probs_dropout_prob", 0.0),
    }  # fmt: skip


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
    "nomic_bert": EncoderFamily(
        "NomicBert",
        (
            (r"^nomic_bert\.", "bert."),
            (r"\bemb_ln\.", "embeddings.LayerNorm."),
            (r"\b(encoder\.)?layers\.(\d+)\.", r"encoder.layer.\2."),
            (r"\.attn\.Wqkv\.", ".attention.self.Wqkv."),
            (r"\.self_attn\.q_proj\.", ".attention.self.query."),
            (r"\.self_attn\.k_proj\.", ".attention.self.key."),
            (r"\.self_attn\.v_proj\.", ".attention.self.value."),
            (r"\.(self_attn\.o_proj|attn\.out_proj)\.", ".attention.output.dense."),
            (r"\.(norm1|post_attention_layernorm)\.", ".attention.output.LayerNorm."),
            (r"\.(norm2|post_mlp_layernorm)\.", ".output.LayerNorm."),
            (r"\.mlp\.(fc11|up_proj)\.", ".intermediate.dense."),
            (r"\.mlp\.(fc12|gate_proj)\.", ".intermediate.gate."),
            (r"\.mlp\.(fc2|down_proj)\.", ".output.dense."),
            (r"\.transform\.layer_norm\.", ".transform.LayerNorm."),
        ),
        keys=_NOMIC_KEYS,
        knobs=_nomic,
        fused={"self.Wqkv": "query_key_value"},
    ),
}
