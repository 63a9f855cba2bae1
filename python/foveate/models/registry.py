"""The architectures, each once: what loading, generation, pipelines and training have to know of a family of models.

A new one is a module of its own beside this file, with `from_hf` in its config class, and an entry in `ARCHITECTURES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from foveate.files.checked import CheckpointError
from foveate.models import (
    bart,
    bart_heads,
    bert,
    deberta,
    decoder_classifier,
    decoder_families,
    encoder_decoder_families,
    encoder_families,
    gpt2,
    llama,
    modernbert,
    t5,
)


@dataclass(frozen=True)
class Architecture:
    """exported_as: model_type of a config.json -> the class that transformers has for it, which exports name.

    layer: the module that is recomputed by gradient checkpointing and whose linear layers LoRA adapts. objectives: of training.
    dropouts: keys of config.json. suited: what of foveate uses such a model, for errors. heads: by the names that `load_model` takes,
    and named_heads by those of a config's `architectures`; {} for a family with one head only. readers: of models that write text, what
    their checkpoints with another head are, by the names that `load_model` takes for it. names, fused: what stored weights become, see
    `RenamedWeights`.
    """

    exported_as: Mapping[str, str]
    model: type[nn.Module]
    layer: type[nn.Module]
    objectives: tuple[str, ...]
    suited: str
    dropouts: tuple[str, ...] = ("attention_dropout",)
    continues_text: bool = True
    encoder_decoder: bool = False
    limited_positions: bool = True
    # Whether a layer's weights are read by its own forward alone, so that FSDP gathers them layer by layer.
    layers_stand_alone: bool = True
    tied_by_default: bool = False
    heads: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    named_heads: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    readers: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, str] = field(default_factory=dict)

    def transformers_name(self, model: nn.Module, model_type: str) -> str:
        """What `architectures` of the config.json of an exported model says."""
        if type(model) is self.readers.get("sequence-classification"):
            return self.classifier_name(model_type)
        named = (name for name, kind in self.named_heads.items() if kind is type(model))
        return next(named, self.exported_as[model_type])

    def classifier_name(self, model_type: str) -> str:
        """What transformers calls the classifier of a decoder."""
        return self.exported_as[model_type].replace("ForCausalLM", "ForSequenceClassification")


_LEARNT_BY_ENCODERS = ("masked-lm", "question-answering", "sequence-classification")
# What a decoder that can be trained learns, and with a classifier's head.
_DECODES = ("causal-lm", "dpo", "simpo", "orpo", "kto", "grpo", "distill")


def _decoder(model_type: str) -> Architecture:
    family = decoder_families.FAMILIES[model_type]
    return Architecture(
        {model_type: family.name},
        llama.Llama,
        llama.LlamaLayer,
        (*_DECODES, "reward") if family.trains else (),  # exports have Llama's names
        "foveate.LLM",
        readers={"sequence-classification": decoder_classifier.LlamaForSequenceClassification},
        names=family.names,
        fused=family.fused,
    )


def _encoder(model_type: str) -> Architecture:
    family = encoder_families.FAMILIES[model_type]
    trained = model_type == "bert"  # exports have BERT's names
    return Architecture(
        {model_type: f"{family.classes}Model"},
        bert.Bert,
        bert.BertLayer,
        _LEARNT_BY_ENCODERS if trained else (),
        "foveate.QuestionAnswerer",
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        continues_text=False,
        heads=bert.HEADS,
        named_heads=bert.named_heads(model_type),
        names=family.names,
        fused=family.fused,
    )


def _deberta(model_type: str, classes: str, **options: Any) -> Architecture:
    return Architecture(
        {model_type: f"{classes}Model"},
        deberta.Deberta,
        deberta.DebertaLayer,
        suited="foveate.ZeroShotClassifier",
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        continues_text=False,
        layers_stand_alone=False,  # the norm of the position table and the convolution are the encoder's
        heads=deberta.HEADS,
        named_heads=deberta.named_heads(classes),
        **options,
    )


def _encoder_decoder(model_type: str) -> Architecture:
    family = encoder_decoder_families.FAMILIES[model_type]
    return Architecture(
        {model_type: family.name},
        bart.Bart,
        bart.BartLayer,
        ("seq2seq",) if family.trains else (),
        "foveate.Text2Text",
        dropouts=("dropout", "attention_dropout", "activation_dropout"),
        continues_text=False,
        encoder_decoder=True,
        layers_stand_alone=False,  # as of T5 the keys of the source are computed before the layers
        readers=bart_heads.HEADS,
    )


ARCHITECTURES = (
    *(_decoder(model_type) for model_type in decoder_families.FAMILIES),
    Architecture(
        {"gpt2": "GPT2LMHeadModel"},
        gpt2.GPT2,
        gpt2.GPT2Layer,
        _DECODES,
        "foveate.LLM",
        dropouts=("embd_pdrop", "resid_pdrop", "attn_pdrop"),
        tied_by_default=True,
    ),
    *(_encoder(model_type) for model_type in encoder_families.FAMILIES),
    _deberta("deberta-v2", "DebertaV2", objectives=_LEARNT_BY_ENCODERS),
    # exports have the names of version 2
    _deberta("deberta", "Deberta", objectives=(), names=deberta.FIRST_NAMES, fused=deberta.FIRST_FUSED),
    Architecture(
        {"modernbert": "ModernBertModel"},
        modernbert.ModernBert,
        modernbert.ModernBertLayer,
        (),
        "foveate.Embedder",
        continues_text=False,
        heads=modernbert.HEADS,
        named_heads=modernbert.NAMED_HEADS,
    ),
    Architecture(
        {
            "t5": "T5ForConditionalGeneration",
            "mt5": "MT5ForConditionalGeneration",
            "umt5": "UMT5ForConditionalGeneration",
            "longt5": "LongT5ForConditionalGeneration",
        },
        t5.T5,
        t5.T5Block,
        ("seq2seq", "span-corruption"),
        "foveate.Text2Text",
        dropouts=("dropout_rate",),
        continues_text=False,
        encoder_decoder=True,
        limited_positions=False,
        # Its first table serves all blocks, and the decoder's keys of the source are computed before the blocks.
        layers_stand_alone=False,
    ),
    *(_encoder_decoder(model_type) for model_type in encoder_decoder_families.FAMILIES),
)
LAYERS = tuple(architecture.layer for architecture in ARCHITECTURES)


def find(model_type: Any) -> Architecture | None:
    """None for an unknown one."""
    return next((a for a in ARCHITECTURES if isinstance(model_type, str) and model_type in a.exported_as), None)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture of a config.json. CheckpointError for an unknown one, with those that are known."""
    found = find(config.get("model_type"))
    if found is None:
        known = sorted(model_types())
        near = difflib.get_close_matches(str(config.get("model_type")), known, n=1, cutoff=0.8)
        raise CheckpointError(
            f"the architecture {config.get('model_type')!r} (model_type in the config) is not supported"
            + (f", but {near[0]!r} is" if near else "")
            + f"; known are {', '.join(known)}"
        )
    return found


def model_types(**wanted: Any) -> list[str]:
    """The model types of the architectures whose fields have these values, or list them; without values of all."""
    chosen = [a for a in ARCHITECTURES if all(_has(getattr(a, name), value) for name, value in wanted.items())]
    return [kind for a in chosen for kind in a.exported_as]


def _has(value: Any, wanted: Any) -> bool:
    return (
        wanted in value
        if isinstance(value, tuple)
        else bool(value) == wanted
        if isinstance(wanted, bool)
        else value == wanted
    )
