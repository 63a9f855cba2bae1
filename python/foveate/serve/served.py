"""A model under its name: loading in a thread, then running in an engine of its own."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foveate
from foveate.generation.lora import modules_of
from foveate.models.registry import find
from foveate.pipelines.embedding import Embedder, read_sentence_transformers
from foveate.serve.errors import ApiError, bad_request, of_model
from foveate.serve.jobs import Job
from foveate.serve.processors import Processors
from foveate.serve.worker import EngineWorker

log = logging.getLogger("foveate.serve")


class ServedModel:
    """name: what requests call it. load: makes the LLM, or a pipeline of another kind; runs in a thread.

    processors: whose part for models the engine's thread uses. state: "waiting", "loading", "ready" or "failed"; error: why it failed.
    """

    def __init__(self, name: str, load: Callable[[], Any], processors: Processors | None = None) -> None:
        self.name, self._load, self._processors = name, load, processors
        self.state = "waiting"
        self.error: str | None = None
        self.llm: Any = None
        self.pipeline: Any = None
        self.worker: EngineWorker | None = None
        self.created = int(time.time())
        self.load_seconds = 0.0
        self.path: str | Path | None = None  # that it was loaded from
        self.users = 0  # requests that have been given it and have not ended
        self.adapter: str | None = None  # its name in the engine, for one that is an adapter
        self._fingerprint: tuple[tuple[Any, ...], str] | None = None  # of what it was made
        self._embedder: Embedder | None = None

    @property
    def base(self) -> ServedModel:
        """Whose engine it runs in."""
        return self

    def load(self, loop: asyncio.AbstractEventLoop, on_outputs: Callable[[ServedModel, list[Job]], None]) -> None:
        """In a thread. Does not raise: `state` says how it went."""
        self.state, began = "loading", time.monotonic()
        try:
            made = self._load()
            if hasattr(made, "engine"):
                self.llm = made
                self.worker = EngineWorker(made.engine, loop, lambda jobs: on_outputs(self, jobs), self._processors)
                self.worker.start()
            else:
                self.pipeline = made
        except Exception as error:
            self.error = str(error)
            self.state = "failed"
            log.error("model %s cannot be loaded: %s", self.name, error)
            return
        self.load_seconds = time.monotonic() - began
        self.state = "ready"
        log.info("model %s is ready after %.1f s", self.name, self.load_seconds)

    def causal(self) -> tuple[Any, EngineWorker]:
        """The LLM and its worker. ApiError when it is not ready, or another kind of model."""
        self.check_ready()
        if self.worker is None:
            raise bad_request(f"{self.name} does not continue text; it is a {type(self.pipeline).__name__}", "model")
        return self.llm, self.worker

    def embedder(self) -> Embedder:
        """The pipeline, or for an LLM one over its weights. ApiError where there is none."""
        self.check_ready()
        if isinstance(self.pipeline, Embedder):
            return self.pipeline
        if self.llm is None:
            holds = type(self.pipeline).__name__
            raise bad_request(
                f"{self.name} gives no embeddings: it is of the kind {holds}, and they come from the kind Embedder or LLM",
                "model",
            )
        if self.adapter is not None:
            raise bad_request(
                f"{self.name} gives no embeddings: it is an adapter beside its base; ask {self.base.name}, or serve the adapter as a model "
                "of its own, which merges it",
                "model",
            )
        if self.llm.tokenizer is None:
            raise bad_request(f"{self.name} gives no embeddings: it has no tokenizer, and they are of texts", "model")
        if self._embedder is None:
            modules = modules_of(self.llm.engine.model)
            self._embedder = Embedder(modules, self.llm.tokenizer, max_seq_length=self.llm.max_model_len)
        return self._embedder

    def check_ready(self) -> None:
        if self.state == "failed":
            reason = f"the model {self.name} could not be loaded; the server's log has the reason"
            raise of_model(ApiError(503, reason, code="failed"), self.name)
        if self.state != "ready":
            reason = f"the model {self.name} is not loaded yet; /ready says when it is"
            raise of_model(ApiError(503, reason, code="loading", retry_after=5), self.name)

    @property
    def fingerprint(self) -> str:
        """Changes with the version, the model and what runs it."""
        about = (self.name, getattr(self.llm, "runs_on", ""), getattr(self.llm, "config", None))
        if self._fingerprint is None or self._fingerprint[0] != about:
            text = repr((foveate.__version__, *about[:2], str(about[2] or "")))
            self._fingerprint = about, "fv_" + hashlib.sha256(text.encode()).hexdigest()[:12]
        return self._fingerprint[1]

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stop()


class ServedAdapter(ServedModel):
    """A LoRA adapter that runs in the engine of `base`, in the same steps as other adapters and none."""

    def __init__(self, name: str, base: ServedModel, folder: str | Path) -> None:
        super().__init__(name, lambda: None)
        self._base, self.folder, self.adapter = base, folder, name

    @property
    def base(self) -> ServedModel:
        return self._base

    def load(self, loop: asyncio.AbstractEventLoop, on_outputs: Callable[[ServedModel, list[Job]], None]) -> None:
        self.state, began = "loading", time.monotonic()
        try:
            llm, worker = self._base.causal()
            adapters = llm.engine.adapters
            found = adapters.read(self.name, self.folder)
            worker.between_steps(lambda: adapters.add(found)).result()
        except Exception as error:
            self.error = error.message if isinstance(error, ApiError) else str(error)
            self.state = "failed"
            log.error("adapter %s cannot be loaded: %s", self.name, self.error)
            return
        self.llm, self.worker = llm, worker
        self.load_seconds = time.monotonic() - began
        self.state = "ready"
        log.info("adapter %s of %s is ready", self.name, self._base.name)

    def stop(self) -> None:
        """The engine is the base's."""


# What a checkpoint's config calls its architecture, and the pipeline of foveate that serves it.
_HEADS = {"QuestionAnswering": "QuestionAnswerer", "SequenceClassification": "TextClassifier"}


def loader(path: str | Path, options: dict[str, Any]) -> Callable[[], Any]:
    """What `ServedModel` calls: an LLM for a causal model, Text2Text for an encoder-decoder; a TextClassifier where there is a head that
    classifies, a Reranker where into one class; an Embedder for another encoder without a known head, and for a causal model whose folder
    says how its vectors become one."""

    def load() -> Any:
        from foveate.models import open_checkpoint

        checkpoint = open_checkpoint(path)
        kind = _kind(checkpoint.config, checkpoint.path)
        if kind == "LLM":
            return foveate.LLM(checkpoint, **options)
        shared = {
            name: value for name, value in options.items() if name in ("device", "dtype", "quantization", "progress")
        }
        return getattr(foveate, kind)(path, **shared)

    return load


def _kind(config: dict[str, Any], folder: Path) -> str:
    architecture = find(config.get("model_type"))
    architectures = " ".join(map(str, config.get("architectures") or []))
    found = next((kind for name, kind in _HEADS.items() if name in architectures), None)
    if architecture is None or (found != "TextClassifier" and architecture.continues_text):
        return "Embedder" if read_sentence_transformers(folder) else "LLM"
    if found is None:
        return "Text2Text" if architecture.encoder_decoder else "Embedder"
    if found == "TextClassifier" and len(config.get("id2label") or range(int(config.get("num_labels", 2)))) == 1:
        return "Reranker"
    return found
