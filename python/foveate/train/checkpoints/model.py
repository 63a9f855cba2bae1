"""The model of a run: loaded or new, and written as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models import Checkpoint, load_model
from foveate.models.checkpoint.base import Blocks, Weights
from foveate.models.checkpoint.huggingface import HuggingFaceCheckpoint
from foveate.models.checkpoint.reading import read_config
from foveate.models.loading import checked_device, model_class, tie_weights
from foveate.models.registry import architecture_of
from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.modules.init_weights import draw_weights
from foveate.train.modules.lora import HEADS
from foveate.train.objectives.base import Objective


@dataclass
class TrainedModel:
    """config: the keys of config.json, with the tokenizer's and the head's numbers filled in. checkpoint: what it was loaded from, whose
    other settings the export keeps. dtype: of the exported weights; they are trained in float32."""

    model: nn.Module
    config: dict[str, Any]
    tokenizer: Tokenizer
    name: str | None = None  # of the checkpoint, as it was given
    checkpoint: Checkpoint | None = None
    dtype: torch.dtype = torch.float32

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """config.json, model.safetensors, tokenizer.json and its settings, as transformers and `load_model` read them."""
        from safetensors.torch import save_file

        model: Any = self.model
        transposed = model.transposed
        constants = {name: p.detach() for name, p in model.named_parameters() if _is_constant(model, name)}
        weights = {**constants, **weights}
        stored = {}
        for name, value in weights.items():
            swap = transposed is not None and transposed.fullmatch(name) is not None
            stored[name] = (value.t() if swap else value).to(self.dtype).contiguous().cpu()
        overflowed = [name for name, value in stored.items() if not value.isfinite().all()]
        if overflowed and self.dtype == torch.float16:
            raise ValueError(
                f"{overflowed[0]} has grown beyond what float16, the checkpoint's dtype, can hold; train from a checkpoint in bfloat16 or "
                "float32"
            )
        tied = not any(f"{head}.weight" in stored for head in HEADS)
        if not tied:  # transformers then reads BERT's other tied weight, the decoder's bias, under both names
            aliases = {alias: name for alias, name in model.tied.items() if name in stored and alias not in stored}
            stored |= {alias: stored[name].clone() for alias, name in aliases.items()}
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        self.export_settings(folder, self.dtype, tied=tied)

    def export_settings(self, folder: Path, dtype: torch.dtype, *, tied: bool) -> None:
        """tied: whether the head is the embedding, for models that have a say in it."""
        config = {key: value for key, value in self.config.items() if key != "torch_dtype"}
        name = architecture_of(config).transformers_name(self.model, config["model_type"])
        config |= {"architectures": [name], "dtype": str(dtype).removeprefix("torch.")}
        if hasattr(self.model.config, "tied"):
            config["tie_word_embeddings"] = tied
        if hasattr(self.model.config, "scaled") and "scale_decoder_outputs" not in config:
            config["scale_decoder_outputs"] = self.model.config.scaled
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        export_tokenizer(self.tokenizer, folder, self.checkpoint, config.get("model_type"))


def _is_constant(model: Any, name: str) -> bool:
    """Whether a weight belongs to the checkpoint and is never trained."""
    constants = getattr(model, "constants", None)
    return constants is not None and constants.fullmatch(name) is not None


# Keys of tokenizer_config.json that are left out: what tokenizer.json says itself, or names files or code that the export does not have.
_NOT_EXPORTED = ("added_tokens_decoder", "extra_special_tokens", "backend", "auto_map", "tokenizer_file", "name_or_path",
                 "special_tokens_map_file", "tokenizer_class")  # fmt: skip


def export_tokenizer(
    tokenizer: Tokenizer, folder: Path, checkpoint: Checkpoint | None = None, kind: str | None = None
) -> None:
    """tokenizer.json and the settings beside it, of generation too, with what the checkpoint's say beside it. kind: model_type."""
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    known = {} if checkpoint is None else checkpoint.tokenizer_config
    settings = {name: value for name, value in known.items() if name not in _NOT_EXPORTED}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special}
    if kind in ("bert", "deberta-v2"):  # else transformers would call every text of a pair the first
        settings.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    _write(folder / "tokenizer_config.json", settings)
    if tokenizer.chat_template is not None and not settings.get("chat_template"):
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template)
    generation = {} if checkpoint is None else dict(checkpoint.generation_config)
    ends = sorted(tokenizer.eos_ids)
    before = generation.get("eos_token_id")
    if ends and set(before if isinstance(before, list) else [before]) != set(ends):
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    if ends and tokenizer.bos_id is not None:
        generation.setdefault("bos_token_id", tokenizer.bos_id)
    if generation:
        _write(folder / "generation_config.json", generation)


def _write(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2) + "\n")


def load(config: TrainConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, objective: Objective) -> TrainedModel:
    """The checkpoint's model in float32. A head that it lacks is new, and so is a classifier of other classes.

    Weights to be trained get memory of their own, as loaded ones are views of the file. Under LoRA linear layers stay packed if
    they are packed in the file, or are packed as config.quantization says; otherwise all are expanded.
    """
    head = objective.head
    hf_config = _hf_config(config, checkpoint.config, objective)
    classes = objective.classes
    opened = dataclasses.replace(checkpoint, config=hf_config)
    if classes is not None and not classes.known:
        opened = WithoutClassifier(**vars(opened))
    torch.manual_seed(config.seed)  # of a new head
    model = load_model(
        opened, device=config.device, dtype=torch.float32,
        quantization=config.quantization if config.lora_rank else "none", progress=config.progress, head=head,
        new_head=head is not None and head != "encoder",
    )  # fmt: skip
    for p in model.parameters():
        if not config.lora_rank:
            p.data = p.data.clone()
    check_vocabulary(model, tokenizer, str(checkpoint.path))
    return TrainedModel(model, hf_config, tokenizer, config.model, checkpoint, stored_dtype(checkpoint))


class WithoutClassifier(HuggingFaceCheckpoint):
    """One whose classifier, if it has any, is of other classes."""

    def weights(self) -> Weights:
        return _Without(super().weights(), ("classifier.weight", "classifier.bias"))


class _Without:
    def __init__(self, whole: Weights, absent: tuple[str, ...]) -> None:
        self.linear_layout, self.nbytes, self.loaded_bytes = whole.linear_layout, whole.nbytes, whole.loaded_bytes
        self._whole, self._absent = whole, absent

    def names(self) -> list[str]:
        return [name for name in self._whole.names() if name not in self._absent]

    def get(self, name: str) -> Tensor | Blocks:
        return self._whole.get(name)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most of the checkpoint's weights; float32 for GGUF files, whose matrices are blocks."""
    weights = checkpoint.weights()
    if weights.linear_layout:
        return torch.float32
    sizes: dict[torch.dtype, int] = {}
    for name in weights.names():
        value = weights.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    found = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def create(config: TrainConfig, tokenizer: Tokenizer, objective: Objective) -> TrainedModel:
    """A new model of config.new_model, a config.json's keys; vocab_size and the special tokens' ids are the tokenizer's."""
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": min(tokenizer.eos_ids, default=None),
        "pad_token_id": tokenizer.pad_id,
    }
    hf_config = {"vocab_size": tokenizer.vocab_size, **ids, **(config.new_model or {})}
    hf_config = _hf_config(config, hf_config, objective)
    kind: Any = model_class(hf_config, objective.head)
    model = kind(read_config(kind, hf_config, "new_model"))
    draw_weights(model, config.seed)
    tie_weights(model)
    check_vocabulary(model, tokenizer, "new_model")
    return TrainedModel(model.to(checked_device(config.device)), hf_config, tokenizer)


def _hf_config(config: TrainConfig, known: dict[str, Any], objective: Objective) -> dict[str, Any]:
    """config.json's keys with the labels of a classifier and the dropout of this run."""
    hf_config = dict(known)
    classes = objective.classes
    if classes is not None:
        labels = classes.names
        architecture = architecture_of(hf_config)
        if "sequence-classification" in architecture.readers:
            hf_config["architectures"] = [architecture.classifier_name(hf_config["model_type"])]
            hf_config.pop("num_labels", None)
        several = classes.several
        hf_config["problem_type"] = (
            "regression" if len(labels) == 1 else f"{'multi' if several else 'single'}_label_classification"
        )
        hf_config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        hf_config["label2id"] = {label: i for i, label in enumerate(labels)}
    if config.dropout is not None:
        hf_config |= dict.fromkeys(architecture_of(hf_config).dropouts, config.dropout)
    return hf_config


def check_vocabulary(model: nn.Module, tokenizer: Tokenizer, where: str) -> None:
    rows: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding of {where} {rows} rows; they do not belong together, or "
            "vocab_size in the config is too small"
        )
