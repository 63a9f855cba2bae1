# ruff: noqa: F401, F403, F405
"""Flash-style attention, fused softmax and KV-cache kernels for CPU and GPU, for any torch."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from foveate import _moved
from foveate._version import __version__

# The model layer is imported when it is first used: it needs more libraries than the kernels do.
_LAZY = {
    **dict.fromkeys(
        [
            "Embedder",
            "FillMask",
            "QuestionAnswerer",
            "Reranker",
            "Text2Text",
            "TextClassifier",
            "TokenClassifier",
            "ZeroShotClassifier",
        ],
        "foveate.pipelines",
    ),
    "LLM": "foveate.generation.llm",
    "SamplingParams": "foveate.generation",
    "ring_attention": "foveate.ring",
}
_PACKAGES = ("data", "evaluate", "guard", "inspect", "train")


def _is_command() -> bool:
    """Whether this process is the command line, which answers --help and wrong flags before torch, two seconds of it, is loaded."""
    args = sys.orig_argv[1:]
    while args and args[0].startswith("-") and args[0] not in ("-m", "-c"):
        args = args[2:] if args[0] in ("-X", "-W") else args[1:]
    if args[:1] == ["-m"]:
        return args[1:2] == ["foveate"]
    return bool(args) and os.path.basename(args[0]) in ("foveate", "foveate.exe")


COMMAND_LINE = _is_command()
_moved.install()

if TYPE_CHECKING or not COMMAND_LINE:
    from foveate._public import *


def load_public() -> None:
    """Puts the names of `_public` here, where that did not happen at the start."""
    public = importlib.import_module("foveate._public")
    globals().update({name: getattr(public, name) for name in __all__ if hasattr(public, name)})


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"foveate.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if COMMAND_LINE and name in __all__ and "foveate._public" not in sys.modules:
        load_public()
        return globals()[name]
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_PACKAGES})


__all__ = [
    "LLM",
    "CacheFull",
    "CacheView",
    "CheckpointError",
    "CrossEntropyOutput",
    "Embedder",
    "FillMask",
    "PagedKVCache",
    "QuestionAnswerer",
    "RelativeBias",
    "Reranker",
    "SamplingParams",
    "Text2Text",
    "TextClassifier",
    "TokenClassifier",
    "UnsupportedError",
    "ZeroShotClassifier",
    "apply_rotary",
    "attention",
    "attention_varlen",
    "attention_weights",
    "attention_with_kv_cache",
    "backends",
    "cross_entropy",
    "drop_in",
    "explain",
    "geglu",
    "info",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention",
    "nn",
    "ring_attention",
    "rms_norm",
    "sdpa",
    "softmax",
    "swiglu",
]
