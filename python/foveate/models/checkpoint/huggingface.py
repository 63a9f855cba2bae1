"""Hugging Face folders: config.json, the tokenizer's files and safetensors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError, is_there, library_errors, read_json, read_text
from foveate.models.checkpoint.base import Checkpoint, Weights
from foveate.models.checkpoint.mxfp4 import Mxfp4Weights
from foveate.models.checkpoint.quantized import QuantizedWeights, method_of, settings_of
from foveate.models.checkpoint.schemas import GENERATION, INDEX, SPECIAL_TOKENS, TOKENIZER
from foveate.tokenizer import NEED, Tokenizer, read_backend
from foveate.tokenizer.added_tokens import add_named_tokens, special_tokens
from foveate.tokenizer.vocab_files import read_older_tokenizer


class HuggingFaceCheckpoint(Checkpoint):
    """path is the folder."""

    def tokenizer(self) -> Tokenizer | None:
        """From tokenizer.json, or from BERT's vocab.txt or the vocab.json and merges.txt of GPT-2 and Qwen 2; None without any of them.

        With the tokens that tokenizer_config.json, added_tokens.json and special_tokens_map.json name beside it.
        """
        file = self.path / "tokenizer.json"
        named = special_tokens(self.tokenizer_config, read_json(self.path / "special_tokens_map.json", SPECIAL_TOKENS))
        if is_there(file):
            backend = read_backend(file)
        else:
            backend = read_older_tokenizer(self.path, self.config.get("model_type"), named)
        if backend is None:
            return None
        with library_errors(f"{self.path} names tokens that its tokenizer cannot have"):
            add_named_tokens(backend, named, self.path)
            return Tokenizer(
                backend, config=self.config, generation_config=self.generation_config, tokenizer_config=named,
                chat_template=self.chat_template,
            )  # fmt: skip

    def weights(self) -> Weights:
        """Quantised ones as Blocks. CheckpointError for a method that is not known here."""
        weights, method = SafetensorsWeights(self.path), method_of(self.config, self.path)
        if method is None:
            return weights
        if method == "mxfp4":
            return Mxfp4Weights(weights)
        kind = self.config.get("model_type")
        turned = kind if kind == "gpt2" else None
        return QuantizedWeights(weights, method, settings_of(self.config, self.path), self.path, turned)


def describe(folder: Path, config: dict[str, Any]) -> HuggingFaceCheckpoint:
    """The folder's files beside the weights."""
    tokenizer_config = read_json(folder / "tokenizer_config.json", TOKENIZER)
    return HuggingFaceCheckpoint(
        path=folder,
        config=config,
        generation_config=read_json(folder / "generation_config.json", GENERATION),
        chat_template=_chat_template(folder, tokenizer_config),
        tokenizer_config=tokenizer_config,
    )


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if is_there(file):
        return read_text(file)
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named ones
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def pickle_refusal(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run any code when it is read, and is never opened here; convert it once, where you trust "
        'it: safetensors.torch.save_file(torch.load(file, weights_only=True), "model.safetensors")'
    )


class SafetensorsWeights:
    """model.safetensors, or the shards that model.safetensors.index.json names, memory-mapped."""

    linear_layout = False

    def __init__(self, folder: Path) -> None:
        self._opened: dict[Path, Any] = {}
        self._file: dict[str, Path] = {}  # of each name
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if is_there(single):
            self._file = dict.fromkeys(self._open(single).keys(), single)
        elif is_there(index):
            for name, shard in (read_json(index, INDEX).get("weight_map") or {}).items():
                self._file[name] = folder / shard
            for shard in sorted(set(self._file.values())):
                if not is_there(shard):
                    raise CheckpointError(f"{index} names {shard.name}, which is not there; download it too")
                self._check_names(shard)
        elif pickles := sorted(folder.glob("*.bin")):
            raise CheckpointError(f"{folder} has no model.safetensors. {pickle_refusal(pickles[0])}")
        else:
            raise CheckpointError(
                f"{folder} has no weights: neither model.safetensors nor model.safetensors.index.json"
            )
        self.nbytes = self.loaded_bytes = sum(shard.stat().st_size for shard in set(self._file.values()))

    def _open(self, file: Path) -> Any:
        if file in self._opened:
            return self._opened[file]
        try:
            from safetensors import safe_open
        except ImportError as error:
            raise ImportError(f"safetensors {NEED}") from error
        with library_errors(f"{file} is truncated or not a safetensors file", "; download it again"):
            self._opened[file] = safe_open(file, framework="pt")
        return self._opened[file]

    def _check_names(self, shard: Path) -> None:
        stored = set(self._open(shard).keys())
        absent = [name for name, file in self._file.items() if file == shard and name not in stored]
        if absent:
            raise CheckpointError(
                f"{shard} lacks {', '.join(absent[:5])}, which the index says it has; download it again"
            )

    def names(self) -> Iterable[str]:
        return self._file

    def get(self, name: str) -> Tensor:
        with library_errors(f"{name} in {self._file[name]} cannot be read"):
            tensor = self._open(self._file[name]).get_tensor(name)
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name} in {self._file[name]} is no tensor but a {type(tensor).__name__}")
        return tensor
