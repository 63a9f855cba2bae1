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
from foveate.models.loading import checked_device, model_class, tie_weights
from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.new_weights import draw_weights

_CAUSAL = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2"}
_DROPOUTS = {
    "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "gpt2": ("embd_pdrop", "resid_pdrop", "attn_pdrop"),
    "t5": ("dropout_rate",),
}


@dataclass
class TrainedModel:
    """config: the keys of config.json, with the tokenizer's and the head's numbers filled in."""

    model: nn.Module
    config: dict[str, Any]
    tokenizer: Tokenizer
    name: str | None = None  # of the checkpoint, as it was given

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """config.json, model.safetensors, tokenizer.json and its settings, as transformers and `load_model` read them."""
        from safetensors.torch import save_file

        model: Any = self.model
        transposed = model.transposed
        stored = {}
        for name, value in weights.items():
            swap = transposed is not None and transposed.fullmatch(name) is not None
            stored[name] = (value.t() if swap else value).contiguous().cpu()
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        self.export_settings(folder, next(iter(stored.values())).dtype)

    def export_settings(self, folder: Path, dtype: torch.dtype) -> None:
        config = {key: value for key, value in self.config.items() if key != "torch_dtype"}
        config |= {"architectures": [_architecture(self.model, config)], "dtype": str(dtype).removeprefix("torch.")}
        tied = getattr(self.model.config, "tied", None)
        if tied is not None:
            config["tie_word_embeddings"] = tied
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        export_tokenizer(self.tokenizer, folder)


def _architecture(model: nn.Module, config: dict[str, Any]) -> str:
    kind = config["model_type"]
    if kind in _CAUSAL:
        return f"{_CAUSAL[kind]}ForCausalLM"
    names = {"gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration"}
    if kind in names:
        return names[kind]
    name = type(model).__name__
    return "BertModel" if name == "Bert" else name


def export_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template)
    ends = sorted(tokenizer.eos_ids)
    if ends:
        known = {"eos_token_id": ends[0] if len(ends) == 1 else ends, "bos_token_id": tokenizer.bos_id}
        known = {key: value for key, value in known.items() if value is not None}
        (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n")


def load(
    config: TrainConfig, checkpoint: Checkpoint, tokenizer: Tokenizer, head: str | None, labels: list[str] | None
) -> TrainedModel:
    """The checkpoint's model in float32. A head that it lacks is new.

    Weights to be trained get memory of their own, as loaded ones are views of the file. Under LoRA linear layers stay packed if
    they are packed in the file, or are packed as config.quantization says; otherwise all are expanded.
    """
    settings = _settings(config, checkpoint.config, labels)
    torch.manual_seed(config.seed)  # of a new head
    model = load_model(
        dataclasses.replace(checkpoint, config=settings), device=config.device, dtype=torch.float32,
        quantization=config.quantization if config.lora_rank else "none", progress=config.progress, head=head,
        new_head=head is not None and head != "encoder",
    )  # fmt: skip
    for p in model.parameters():
        if not config.lora_rank:
            p.data = p.data.clone()
    check_vocabulary(model, tokenizer, str(checkpoint.path))
    return TrainedModel(model, settings, tokenizer, config.model)


def create(config: TrainConfig, tokenizer: Tokenizer, head: str | None, labels: list[str] | None) -> TrainedModel:
    """A new model of config.new_model, a config.json's keys; vocab_size and the special tokens' ids are the tokenizer's."""
    assert config.new_model is not None
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": min(tokenizer.eos_ids, default=None),
        "pad_token_id": tokenizer.pad_id,
    }
    settings = {"vocab_size": tokenizer.vocab_size, **ids, **config.new_model}
    settings = _settings(config, settings, labels)
    kind: Any = model_class(settings, head)
    model = kind(kind.config_class.from_hf(settings))
    draw_weights(model, config.seed)
    tie_weights(model)
    check_vocabulary(model, tokenizer, "new_model")
    return TrainedModel(model.to(checked_device(config.device)), settings, tokenizer)


def _settings(config: TrainConfig, found: dict[str, Any], labels: list[str] | None) -> dict[str, Any]:
    """config.json's keys with the labels of a classifier and the dropout of this run."""
    settings = dict(found)
    if labels is not None:
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    if config.dropout is not None:
        names = _DROPOUTS.get(settings.get("model_type", ""), ("attention_dropout",))
        settings |= dict.fromkeys(names, config.dropout)
    return settings


def check_vocabulary(model: nn.Module, tokenizer: Tokenizer, where: str) -> None:
    rows: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the embedding of {where} {rows} rows; they do not belong together, or "
            "vocab_size in the config is too small"
        )
