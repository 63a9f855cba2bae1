"""open_checkpoint: finds a model's files and reads all of them but the weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError, is_there, library_errors, read_json, read_text
from foveate.models.file_schemas import ANY_CONFIG, GENERATION, INDEX, SPECIAL_TOKENS, TOKENIZER
from foveate.tokenizer import NEED, Tokenizer, read_backend
from foveate.tokenizer.added_tokens import add_named_tokens, special_tokens
from foveate.tokenizer.vocab_files import read_older_tokenizer


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix as GGUF stores it: blocks uint8 [out, in / 32 * bytes of a block]; format: "q8_0", "q4_0" or "q4_1"."""

    blocks: Tensor
    format: str
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.blocks.shape[0], self.in_features)

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes


class Weights(Protocol):
    """Where weights come from. Names are Hugging Face's; tensors are views of the memory-mapped file where that is possible."""

    linear_layout: bool  # every matrix is [out, in], also those that Hugging Face stores the other way round
    nbytes: int  # in the files
    loaded_bytes: int  # in memory, as `load_model` reads them without other options

    def names(self) -> Iterable[str]: ...

    def get(self, name: str) -> Tensor | Blocks: ...


@dataclass
class Checkpoint:
    """A model on disk. config has config.json's keys, also for GGUF files; generation_config is {} where there is none."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    tokenizer_config: dict[str, Any] = field(default_factory=dict)

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
        return SafetensorsWeights(self.path)


def open_checkpoint(path: str | Path | Checkpoint, base: str | Path | None = None) -> Checkpoint:
    """A Hugging Face folder, a .gguf file, or the name of an installed package that holds one of them, at most one folder deep; or a
    folder with a LoRA adapter in peft's format, which stands for its base with the updates in the weights. An open one as it is.

    base: of an adapter, instead of the one that it names. Reads no weights but an adapter's. FileNotFoundError where there is nothing
    of that name, CheckpointError for what is not a model.
    """
    if isinstance(path, Checkpoint):
        return path
    if not isinstance(path, (str, Path)) or not str(path):
        raise TypeError(
            f"the path of a model is {path!r}; give a folder, a .gguf file or the name of an installed package"
        )
    place = Path(path).expanduser()
    if (place / "adapter_config.json").is_file() and not (place / "config.json").exists():
        return _open_adapter(place, base)
    if base is not None:
        raise ValueError(f"base={str(base)!r} is for an adapter, and {path} is none: it has no adapter_config.json")
    if place.is_file():
        return _open_file(place)
    if place.is_dir():
        return _open_folder(place)
    package = _package_folder(str(path))
    if package is None:
        raise FileNotFoundError(
            f"{path} is neither a file or folder here nor the name of an installed package; a model of the Hugging Face Hub is "
            f"downloaded first, e.g. by `hf download {path} --local-dir FOLDER`"
        )
    for folder in (package, *sorted(p for p in package.iterdir() if p.is_dir())):
        if (folder / "config.json").exists() or any(folder.glob("*.gguf")):
            return _open_folder(folder)
    raise CheckpointError(f"the package {path} in {package} holds neither a config.json nor a .gguf file")


def _package_folder(name: str) -> Path | None:
    """Found without importing the package, also by the name that pip has for it, with hyphens."""
    name = name.replace("-", "_")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _open_file(file: Path) -> Checkpoint:
    with file.open("rb") as stream:
        start = stream.read(4)
    if start == b"GGUF":
        from foveate.models.gguf import open_gguf

        return open_gguf(file)
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(_pickle(file))
    if (file.name == "config.json" or file.suffix == ".safetensors") and is_there(file.parent / "config.json"):
        return _open_folder(file.parent)
    if file.suffix == ".safetensors":
        raise CheckpointError(f"{file} holds weights only; give its folder {file.parent}, with the config.json")
    raise CheckpointError(f"{file} is not a model: it does not start with 'GGUF', and a Hugging Face model is a folder")


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / "snapshots").is_dir():
        return _open_folder(_snapshot(folder))
    if not (folder / "config.json").exists():
        files = sorted(folder.glob("*.gguf"))
        if len(files) == 1:
            return _open_file(files[0])
        if files:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{folder} holds several models, {names}; give the path of one")
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json and no .gguf file")
    return _described(folder, read_json(folder / "config.json", ANY_CONFIG))


def _open_adapter(folder: Path, base: str | Path | None) -> Checkpoint:
    from foveate.models.adapters import adapted_checkpoint

    settings = read_json(folder / "adapter_config.json")
    named = base if base is not None else settings.get("base_model_name_or_path")
    if not isinstance(named, (str, Path)):
        raise CheckpointError(f"{folder} holds an adapter that does not say of which model; name it as base")
    if (Path(named).expanduser() / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds an adapter of {named}, which is an adapter too; name a model as base")
    try:
        checkpoint = open_checkpoint(named)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds an adapter of {named}, which is neither a file or folder here nor the name of an installed package; name "
            "the model that it adapts as base"
        ) from error
    return adapted_checkpoint(_described(folder, {}), checkpoint, settings)


def _described(folder: Path, config: dict[str, Any]) -> Checkpoint:
    tokenizer_config = read_json(folder / "tokenizer_config.json", TOKENIZER)
    return Checkpoint(
        path=folder,
        config=config,
        generation_config=read_json(folder / "generation_config.json", GENERATION),
        chat_template=_chat_template(folder, tokenizer_config),
        tokenizer_config=tokenizer_config,
    )


def _snapshot(folder: Path) -> Path:
    """The folder of the commit that a folder of the Hub's cache names as main, else its only one."""
    snapshots = sorted(p for p in (folder / "snapshots").iterdir() if p.is_dir())
    main = folder / "refs" / "main"
    named = [p for p in snapshots if is_there(main) and p.name == read_text(main, 4096).strip()]
    found = named or snapshots
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "nothing"
        raise CheckpointError(f"{folder}/snapshots holds {names}; give the path of one")
    return found[0]


def _chat_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if is_there(file):
        return read_text(file)
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several named ones
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _pickle(file: Path) -> str:
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
            raise CheckpointError(f"{folder} has no model.safetensors. {_pickle(pickles[0])}")
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
