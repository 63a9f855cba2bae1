"""Paths that modules had before 0.2: importing one gives the module at its new place, with a DeprecationWarning, until 1.0."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "_attention_op": "ops.attention.op",
    "_native": "backend.native",
    "cache_view": "cache.view",
    "checked_files": "files.checked",
    "k_blocks": "quantization.k_blocks",
    "kv_cache": "ops.attention.with_kv_cache",
    "linear": "quantization.gguf_blocks",
    "llm": "generation.llm",
    "loss": "ops.cross_entropy",
    "native_decoder": "models.native_decoder",
    "packed_linear": "ops.packed_linear",
    "packed_weight": "quantization.panels",
    "paged_kv_cache": "cache.paged",
    "question_answering": "pipelines.question_answering",
    "ring_layout": "ring.layout",
    "train.adapter_files": "train.checkpoints.adapter",
    "train.batch": "train.data.batch",
    "train.causal_lm": "train.objectives.causal_lm",
    "train.chat": "train.data.chat",
    "train.classification": "train.objectives.classification",
    "train.data.class_labels": "files.class_labels",
    "train.data.files": "files.data_files",
    "train.data.readers": "files.readers",
    "train.data_files": "files.data_files",
    "train.lora": "train.modules.lora",
    "train.masked_lm": "train.objectives.masked_lm",
    "train.plan": "train.data.plan",
    "train.seq2seq": "train.objectives.seq2seq",
    "train.store": "train.data.token_store",
    "train.tokenized": "train.data.tokenized",
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Asked after the finders that know files, so only for paths that are no longer there."""

    _spec: importlib.machinery.ModuleSpec | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, rest = name.partition(".")
        return importlib.util.spec_from_loader(name, self) if package == "foveate" and rest in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = "foveate." + MOVED[spec.name.removeprefix("foveate.")]
        warnings.warn(f"the module {spec.name} is now {new}; import it from there", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """The module has run at its new place already, and keeps the spec that it has from there."""
        module.__spec__ = self._spec


def install() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
