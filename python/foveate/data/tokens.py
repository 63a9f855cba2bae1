"""Tokenizers by their path, as the `tokenizers` library has them: what counting and comparing need."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError('tokenizers is not installed: pip install "foveate[data]"') from error
    return tokenizers


def read_tokenizer(path: str) -> Any:
    """A tokenizers.Tokenizer of a tokenizer.json, a folder that has one, or any model that `foveate generate` opens."""
    file = Path(path).expanduser()
    library()
    from foveate.tokenizer import read_backend

    if (file / "tokenizer.json").is_file():
        file = file / "tokenizer.json"
    if file.name.endswith(".json") and file.is_file():
        return read_backend(file)
    from foveate.models import open_checkpoint

    tokenizer = open_checkpoint(path).tokenizer()
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer")
    return tokenizer.backend
