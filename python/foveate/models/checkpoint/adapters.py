"""LoRA adapters of peft's format used where a model is: a checkpoint whose weights are the base's with the updates in them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.files.checked import CheckpointError, check, is_there, library_errors, read_json
from foveate.models.checkpoint.base import Blocks, Checkpoint, Weights
from foveate.models.checkpoint.huggingface import HuggingFaceCheckpoint
from foveate.models.checkpoint.schemas import ADAPTER
from foveate.quantization.gguf_blocks import dequantize
from foveate.tokenizer import NEED, Tokenizer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings of peft under which the weights mean something else than they do here, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,), "bias": ("none",), "rank_pattern": ({},), "alpha_pattern": ({},), "layers_to_transform": (),
    "layer_replication": (), "lora_bias": (False,), "trainable_token_indices": (), "target_parameters": ([],),
    "use_qalora": (False,), "use_bdlora": (), "arrow_config": (),
}  # fmt: skip
_ARCHITECTURES = {"SEQ_CLS": "BertForSequenceClassification", "QUESTION_ANS": "BertForQuestionAnswering"}
_TIED = {  # heads, and the embeddings whose matrix they may be
    "lm_head.weight": ("embed_tokens.weight", "wte.weight", "shared.weight"),
    "cls.predictions.decoder.weight": ("word_embeddings.weight",),
}
_BASES = ("model.", "bert.", "transformer.")  # with which some checkpoints write the names, and others not


@dataclass
class AdaptedCheckpoint(HuggingFaceCheckpoint):
    """path is the adapter's folder. Tokenizer, chat template and generation settings are the adapter's where it has them."""

    base: Checkpoint = field(kw_only=True)
    settings: dict[str, Any] = field(kw_only=True)

    def tokenizer(self) -> Tokenizer | None:
        if is_there(self.path / "tokenizer.json"):
            return super().tokenizer()
        found = dataclasses.replace(
            self.base, generation_config=self.generation_config, chat_template=self.chat_template
        )
        return found.tokenizer()

    def weights(self) -> Weights:
        return AdaptedWeights(self.base.weights(), self)


def adapted_checkpoint(own: Checkpoint, base: Checkpoint, settings: dict[str, Any]) -> AdaptedCheckpoint:
    """own: what the adapter's folder has beside the weights. CheckpointError for what is not LoRA as it is known here."""
    check_adapter(settings, own.path)
    found = AdaptedCheckpoint(
        path=own.path, config=dict(base.config), generation_config=base.generation_config | own.generation_config,
        chat_template=own.chat_template or base.chat_template,
        tokenizer_config=base.tokenizer_config | own.tokenizer_config, base=base, settings=settings,
    )  # fmt: skip
    task = settings.get("task_type")
    if base.config.get("model_type") == "bert" and task in _ARCHITECTURES:
        found.config["architectures"] = [_ARCHITECTURES[task]]
    labels = read_json(own.path / "foveate_adapter.json").get("id2label")
    classifier = stored_weights(own.path).get(f"{PREFIX}classifier.weight")
    if isinstance(labels, dict):
        found.config["id2label"] = labels
    elif classifier is not None and task == "SEQ_CLS" and len(base.config.get("id2label") or {}) != classifier.shape[0]:
        found.config["id2label"] = {str(i): f"LABEL_{i}" for i in range(classifier.shape[0])}
    return found


def check_adapter(settings: dict[str, Any], folder: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder} is an adapter of type {settings.get('peft_type')!r}; only LORA is supported")
    for name, neutral in NEUTRAL.items():
        if settings.get(name) is not None and settings[name] not in neutral:
            raise CheckpointError(f"{folder} is an adapter with {name}={settings[name]!r}, which is not supported")
    check(settings, ADAPTER, folder / CONFIG)


def stored_weights(folder: Path) -> dict[str, Tensor]:
    file = folder / WEIGHTS
    if not is_there(file):
        raise CheckpointError(f"{folder} has no adapter: it needs {CONFIG} and {WEIGHTS}")
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"safetensors {NEED}") from error
    with library_errors(f"{file} is truncated or not a safetensors file", "; download it again"):
        return load_file(file)


class AdaptedWeights:
    """W + scale * B A where the adapter has A and B, in fp32 before it is rounded to W's dtype (packed: fp32); its own head where it
    has one. A head that is tied to the embedding stays the base's where only the embedding is adapted, and the other way round, as peft
    has it."""

    def __init__(self, base: Weights, checkpoint: AdaptedCheckpoint) -> None:
        settings, where = checkpoint.settings, checkpoint.path
        self._base, self.linear_layout = base, base.linear_layout
        rank = settings.get("r") or 8
        self._scale = (settings.get("lora_alpha") or 8) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        self._turned = bool(settings.get("fan_in_fan_out")) and not base.linear_layout
        names = set(base.names())
        config = checkpoint.base.config
        tied = config.get("tie_word_embeddings", config.get("model_type") in ("gpt2", "bert", "t5"))
        self._pairs: dict[str, tuple[Tensor, Tensor, bool]] = {}  # A, B, whether of an embedding, by the base's name
        self._own: dict[str, Tensor] = {}
        self._copies: dict[str, str] = {}  # names that the base has not, of tied weights
        stored = {name.removeprefix(PREFIX): value for name, value in stored_weights(where).items()}
        self.nbytes = base.nbytes
        for name, value in stored.items():
            module, _, part = name.rpartition(".lora_")
            if part in ("A.weight", "embedding_A"):
                other = stored.get(name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B"))
                if (
                    other is None
                    or value.dim() != 2
                    or other.dim() != 2
                    or not other.shape[1] == value.shape[0] == rank
                ):
                    raise CheckpointError(f"{where} has no B for {name} that fits it, of rank {rank}")
                self._pairs[self._place(f"{module}.weight", names, tied, where)] = (value, other, part == "embedding_A")
            elif ".lora_" not in name:
                name = name.replace(".base_layer.", ".")  # of an adapted embedding, which peft may write whole too
                own = next((known for known in _spellings(name) if known in names), name)
                self._own[own] = value
        # what has an update is no view of the file, and not packed
        self.loaded_bytes = base.loaded_bytes + sum(4 * b.shape[0] * a.shape[1] for a, b, _ in self._pairs.values())
        self._names = [*dict.fromkeys([*base.names(), *self._own, *self._copies])]

    def _place(self, name: str, names: set[str], tied: bool, where: Path) -> str:
        """The base's name of an adapted weight. One of two tied ones that is adapted alone is a copy from now on."""
        found = next((known for known in _spellings(name) if known in names), None)
        head, embedding = next(((h, n) for h, ends in _TIED.items() for n in names if n.endswith(ends)), ("", None))
        if found is None and name == head and tied and embedding is not None:
            self._copies[name] = embedding
            return name
        if found is None:
            raise CheckpointError(f"{where} adapts {name}, which the base does not have: another model's adapter")
        if found == embedding and tied and head not in names:
            self._copies.setdefault(head, found)
        return found

    def names(self) -> Iterable[str]:
        return self._names

    def get(self, name: str) -> Tensor | Blocks:
        weight = self._own[name] if name in self._own else self._base.get(self._copies.get(name, name))
        if name not in self._pairs:
            return weight
        if isinstance(weight, Blocks):
            weight = dequantize(weight.blocks, weight.format)
        a, b, embedding = self._pairs[name]
        update = self._scale * (b.float() @ a.float())
        update = update.T if embedding or (self._turned and name != "lm_head.weight") else update
        if update.shape != weight.shape:
            raise CheckpointError(
                f"the adapter's update of {name} has shape {list(update.shape)}, and the base's weight {list(weight.shape)}: another "
                "model's adapter"
            )
        return (weight.float() + update).to(weight.dtype)


def _spellings(name: str) -> Iterable[str]:
    """The name, and as checkpoints write it with or without the base's own."""
    yield name
    for base in _BASES:
        yield name.removeprefix(base) if name.startswith(base) else base + name
