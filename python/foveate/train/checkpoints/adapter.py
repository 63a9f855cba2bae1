"""Adapters on disk in peft's format: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError, is_there, library_errors, read_json
from foveate.models import Checkpoint, load_model, open_checkpoint
from foveate.models.checkpoint.adapters import CONFIG, PREFIX, WEIGHTS, check_adapter
from foveate.models.checkpoint.schemas import ADAPTER
from foveate.quantization.names import QUANTISABLE
from foveate.tokenizer import Tokenizer
from foveate.train.checkpoints.model import TrainedModel, WithoutClassifier, export_tokenizer, stored_dtype
from foveate.train.modules.lora import (
    LoraConfig,
    adapters,
    add_lora,
    expand_packed,
    fits,
    layer_names,
    merge_lora,
    saved_modules,
    stored_names,
)

_FIRST = (".lora_A.weight", ".lora_embedding_A")  # a layer's first matrix
_PACKED = "foveate_adapter.json"  # what peft's config has no place for
_TASKS = {
    "BertForQuestionAnswering": "QUESTION_ANS",
    "BertForSequenceClassification": "SEQ_CLS",
    "DebertaForQuestionAnswering": "QUESTION_ANS",
    "DebertaForSequenceClassification": "SEQ_CLS",
    "LlamaForSequenceClassification": "SEQ_CLS",
    "T5": "SEQ_2_SEQ_LM",
    "Bart": "SEQ_2_SEQ_LM",
    "Llama": "CAUSAL_LM",
    "GPT2": "CAUSAL_LM",
}


@dataclass
class AdaptedModel(TrainedModel):
    """A model whose export is its adapters, with the tokenizer beside them."""

    lora: LoraConfig = field(kw_only=True)
    quantization: str | None = field(kw_only=True, default=None)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_adapter(self.model, self.lora, folder, base=self.name, weights=weights)
        export_tokenizer(self.tokenizer, folder, self.checkpoint, self.config.get("model_type"))
        if self.quantization is not None:
            (folder / _PACKED).write_text(json.dumps({"quantization": self.quantization}) + "\n")


def adapted(
    trained: TrainedModel, lora: LoraConfig, *, quantization: str | None = None, adapter: Path | None = None
) -> AdaptedModel:
    """With new adapters, or those of the folder `adapter`. quantization: what `load_model` was told of the frozen weights."""
    if adapter is None:
        add_lora(trained.model, lora)
    else:
        load_adapter(trained.model, adapter, dropout=lora.dropout)
    fields = {field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)}
    return AdaptedModel(**fields, lora=lora, quantization=quantization)


def adapter_settings(adapter: str | Path) -> dict[str, Any]:
    """adapter_config.json, with "quantization": that of the weights that it was trained on, None for those of the file."""
    file, packed = Path(adapter) / CONFIG, Path(adapter) / _PACKED
    found = read_json(packed).get("quantization") if is_there(packed) else None
    if found not in (None, *QUANTISABLE):
        raise CheckpointError(f"{packed} has quantization={found!r:.40}; it must be one of {', '.join(QUANTISABLE)}")
    return read_json(file, ADAPTER) | {"quantization": found}


def save_adapter(
    model: nn.Module, config: LoraConfig, folder: Path, *, base: str | None, weights: dict[str, Tensor] | None = None
) -> None:
    """peft.PeftModel.from_pretrained(base model, folder) reads it. weights: instead of the model's own, by name."""
    from safetensors.torch import save_file

    weights = dict(model.named_parameters()) if weights is None else weights
    stored = {}
    for name, adapter in adapters(model):
        for part, theirs in stored_names(adapter).items():
            stored[f"{PREFIX}{name}.{theirs}"] = weights[f"{name}.{part}"]
    heads = saved_modules(model)
    for name, module in heads.items():
        for leaf, _ in module.named_parameters():
            stored[f"{PREFIX}{name}.{leaf}"] = weights[f"{name}.{leaf}"]
    save_file(
        {name: t.detach().contiguous().cpu() for name, t in stored.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    settings = {
        "peft_type": "LORA", "task_type": _TASKS.get(type(model).__name__), "base_model_name_or_path": base,
        "r": config.rank, "lora_alpha": config.peft_alpha, "lora_dropout": config.dropout,
        "target_modules": _short_names(model, [name for name, _ in adapters(model)]), "use_rslora": config.rslora,
        "modules_to_save": sorted({name.rpartition(".")[2] for name in heads}) or None, "bias": "none",
        "fan_in_fan_out": type(model).__name__ == "GPT2", "inference_mode": True,
    }  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def _short_names(model: nn.Module, names: list[str]) -> list[str]:
    """The last parts of the names if they mean the same layers, else the whole names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = {name for name in layer_names(model) if any(fits(name, s) for s in short)}
    return short if meant == set(names) else sorted(names)


def load_adapter(model: nn.Module, folder: str | Path, *, dropout: float | None = None) -> LoraConfig:
    """Puts the adapter of a folder of peft's format, and its head, into the model; `merge_lora` then folds it in. dropout: instead of
    the adapter's.

    ValueError for adapters of another kind, or of another model.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    if not is_there(folder / CONFIG) or not is_there(folder / WEIGHTS):
        raise CheckpointError(f"{folder} has no adapter: it needs {CONFIG} and {WEIGHTS}")
    settings = read_json(folder / CONFIG, ADAPTER)
    check_adapter(settings, folder)
    lacking = [key for key in ("r", "lora_alpha", "target_modules") if settings.get(key) is None]
    if lacking:
        raise CheckpointError(f"{folder / CONFIG} lacks {' and '.join(lacking)}")
    targets = settings["target_modules"]
    config = LoraConfig(
        settings["r"], settings["lora_alpha"],
        (settings.get("lora_dropout") or 0.0) if dropout is None else dropout,
        None if targets == "all-linear" else tuple([targets] if isinstance(targets, str) else targets),
        bool(settings.get("use_rslora")),
    )  # fmt: skip
    with library_errors(f"{folder / WEIGHTS} is truncated or not a safetensors file", "; download it again"):
        stored = {name.removeprefix(PREFIX): value for name, value in load_file(folder / WEIGHTS).items()}
    # The weights say which layers have adapters, also where the config gives a pattern.
    firsts = {name[: -len(end)]: name for name in stored for end in _FIRST if name.endswith(end)}
    layers, known = tuple(sorted(firsts)), set(layer_names(model))
    foreign = [name for name in layers if name not in known]
    if foreign:
        raise CheckpointError(
            f"{folder} adapts {', '.join(foreign[:3])}, which {type(model).__name__} does not have: another model's adapter"
        )
    if not layers:
        raise CheckpointError(f"{folder / WEIGHTS} has no weights of an adapter (*.lora_A.weight)")
    for name in layers:  # before anything of the rank's size is made
        size = list(stored[firsts[name]].shape)
        if len(size) != 2 or size[0] != config.rank:
            raise CheckpointError(
                f"{folder} has {firsts[name]} of shape {size}, and r={config.rank} in {CONFIG}: damaged, or another model's adapter"
            )
    add_lora(model, dataclasses.replace(config, targets=layers))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in stored.items():
        own = name.removesuffix(".weight") if name.endswith((".lora_A.weight", ".lora_B.weight")) else name
        own = own.replace(".base_layer.", ".base.")  # peft writes adapted embeddings whole, too
        if own not in parameters or parameters[own].shape != value.shape:
            shape = list(parameters[own].shape) if own in parameters else "no such weight"
            raise CheckpointError(
                f"{folder} has {name} of shape {list(value.shape)}, and the model {shape}: another model's adapter"
            )
        with torch.no_grad():
            parameters[own].copy_(value)
    return config


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    head: str | None = None,
    hf_config: dict[str, Any] | None = None,
) -> Path:
    """Writes base model and adapter as one model, a Hugging Face folder in the base's dtype, or in float32 if the adapter was trained on
    packed weights: then those that it was trained on, expanded, are what the folder has.

    base: the one that the adapter names, if None. head: of a BERT, see `load_model`. hf_config: keys of config.json that are not the
    base model's, such as the labels of a classifier.
    """
    known = adapter_settings(adapter)
    base = base or known.get("base_model_name_or_path")
    if base is None:
        raise ValueError(f"{adapter} does not say what it adapts; give base")
    checkpoint = open_checkpoint(base)
    dtype = torch.float32 if known["quantization"] else stored_dtype(checkpoint)
    checkpoint.config |= hf_config or {}
    if head == "sequence-classification":
        checkpoint = WithoutClassifier(**vars(checkpoint))  # the adapter has its own
    model = load_model(
        checkpoint, dtype=torch.float32, quantization=known["quantization"] or "none", progress=False, head=head,
        new_head=head is not None,
    )  # fmt: skip
    load_adapter(model, adapter)
    expand_packed(merge_lora(model))
    tokenizer = _own_tokenizer(Path(adapter), checkpoint)
    if tokenizer is None:
        raise ValueError(f"{base} has no tokenizer")
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    trained = TrainedModel(model, checkpoint.config, tokenizer, None, checkpoint, dtype)
    trained.export(folder, {name: p.detach() for name, p in model.named_parameters()})
    return folder


def _own_tokenizer(adapter: Path, checkpoint: Checkpoint) -> Tokenizer | None:
    """The base's, ending texts where the adapter's generation settings do: it may have learnt to end its turns."""
    tokenizer = checkpoint.tokenizer()
    generation = adapter / "generation_config.json"
    if tokenizer is not None and is_there(generation):
        ends = read_json(generation).get("eos_token_id")
        tokenizer.eos_ids |= {i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)}
    return tokenizer
