"""open_checkpoint: finds a model's files and reads all of them but the weights."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from foveate.files.checked import CheckpointError, check, is_there, read_json, read_text
from foveate.models.checkpoint.adapters import adapted_checkpoint
from foveate.models.checkpoint.base import Checkpoint
from foveate.models.checkpoint.gguf import open_gguf
from foveate.models.checkpoint.gguf_parts import are_parts_of_one
from foveate.models.checkpoint.huggingface import describe, pickle_refusal
from foveate.models.checkpoint.schemas import ANY_CONFIG, SPECIAL_IDS
from foveate.models.registry import find


def open_checkpoint(path: str | Path | Checkpoint, base: str | Path | None = None) -> Checkpoint:
    """A Hugging Face folder, a .gguf file or any part of a split one, or the name of an installed package that holds one of them, at most
    one folder deep; or a folder with a LoRA adapter in peft's format, which stands for its base with the updates in the weights. An open
    one as it is. A folder with the parts of one split .gguf file, and no config.json, is that model.

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
        return open_gguf(file)
    if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(pickle_refusal(file))
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
        if len(files) == 1 or (files and are_parts_of_one(files)):
            return _open_file(files[0])
        if files:
            names = ", ".join(file.name for file in files)
            raise CheckpointError(f"{folder} holds several models, {names}; give the path of one")
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json and no .gguf file")
    return describe(folder, _text_part(read_json(folder / "config.json", ANY_CONFIG), folder))


TEXT_PART = "text_part_of"  # a key of the config of such a checkpoint: the model_type of the whole
# Stored names of a text part, and what they become.
TEXT_WEIGHTS = r"(model\.)?language_model\.|lm_head\."
TEXT_NAMES = (
    (r"^(model\.)?language_model\.lm_head\.", "lm_head."),
    (r"^(model\.)?language_model\.(model\.)?", "model."),
)
_OF_THE_WHOLE = (*SPECIAL_IDS, "tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")


def _text_part(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config of the text part of a model that reads pictures or sounds too (Gemma 3, LLaVA, ...), if it is known; else the config."""
    text = config.get("text_config")
    if not isinstance(text, dict) or find(config.get("model_type")) is not None or find(text.get("model_type")) is None:
        return config
    check(text, ANY_CONFIG, f"text_config in {folder}")
    warnings.warn(
        f"{folder} is of architecture {config.get('model_type')!r}, which reads more than text; its text part, a {text['model_type']}, is "
        "loaded alone",
        stacklevel=4,
    )
    whole = {key: config[key] for key in _OF_THE_WHOLE if config.get(key) is not None and text.get(key) is None}
    return {**text, **whole, TEXT_PART: config.get("model_type")}


def _open_adapter(folder: Path, base: str | Path | None) -> Checkpoint:
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
    return adapted_checkpoint(describe(folder, {}), checkpoint, settings)


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
