"""What the tests of other people's clients share: their import, and a server with a chat model, an embedder and a reranker."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import generation_toys as toys
import serve_toys
from foveate.serve.served import loader
from pipeline_toys import save_encoder

MESSAGES = [{"role": "user", "content": "naïve"}]


def needed(found: bool, what: str) -> None:
    """Skips the file without it, but not where .ci/clients.sh has installed everything."""
    if not found:
        reason = f"{what} is not installed; .ci/clients.sh installs it and runs this"
        assert "FOVEATE_CLIENTS" not in os.environ, reason
        pytest.skip(reason, allow_module_level=True)


def package(name: str) -> ModuleType:
    """Imported without its warnings."""
    needed(importlib.util.find_spec(name.partition(".")[0]) is not None, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@contextlib.contextmanager
def serving(path: Path) -> Iterator[serve_toys.Running]:
    """toy, with a context in which descriptions of tools have room, embed and rank."""
    for name in ("toy", "embed", "rank"):
        (path / name).mkdir()
    save_encoder(path / "embed", "BertModel")
    save_encoder(path / "rank", "BertForSequenceClassification", num_labels=1)
    toys.folder(path / "toy", positions=2048)

    def toy():
        llm = serve_toys.make_llm(path / "toy", num_pages=2048)
        llm.tokenizer.chat_template = serve_toys.TOOL_TEMPLATE
        return llm

    encoders = {name: loader(path / name, {"progress": False}) for name in ("embed", "rank")}
    with serve_toys.serving({"toy": toy, **encoders}) as running:
        yield running
