"""Flash-style attention, fused softmax and KV-cache kernels for CPU and GPU, for any torch."""

import importlib
from typing import Any

from foveate import drop_in, nn
from foveate._backends import UnsupportedError, backends, info
from foveate._explain import explain
from foveate._relative_bias import RelativeBias
from foveate.attention import attention, merge_attention
from foveate.attention_varlen import attention_varlen
from foveate.cache_view import CacheView
from foveate.kv_cache import attention_with_kv_cache
from foveate.loss import cross_entropy, linear_cross_entropy
from foveate.norm import rms_norm
from foveate.paged_kv_cache import CacheFull, PagedKVCache
from foveate.rotary import apply_rotary
from foveate.sdpa import sdpa
from foveate.softmax import log_softmax, softmax

__version__ = "0.1.0"

# The model layer is imported when it is first used: it needs more libraries than the kernels do.
_LAZY = {
    **dict.fromkeys(
        ["Embedder", "FillMask", "Reranker", "TextClassifier", "TokenClassifier", "ZeroShotClassifier"],
        "foveate.pipelines",
    ),
    "LLM": "foveate.llm",
    "QuestionAnswerer": "foveate.question_answering",
    "SamplingParams": "foveate.generation",
    "Text2Text": "foveate.text2text",
    "ring_attention": "foveate.ring",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("foveate.train")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "train"})


__all__ = [
    "LLM",
    "CacheFull",
    "CacheView",
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
    "attention_with_kv_cache",
    "backends",
    "cross_entropy",
    "drop_in",
    "explain",
    "info",
    "linear_cross_entropy",
    "log_softmax",
    "merge_attention",
    "nn",
    "ring_attention",
    "rms_norm",
    "sdpa",
    "softmax",
]
