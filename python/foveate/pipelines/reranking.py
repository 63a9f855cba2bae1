"""Reranker: how well each document answers a query, with a cross-encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from foveate.pipelines.encoder import as_texts
from foveate.pipelines.text_classification import TextClassifier
from foveate.tokenizer import Tokenizer


class Reranker:
    """A BERT with one output that reads query and document together (Nogueira and Cho 2019, arXiv 1901.04085).

        rank = Reranker("path to a cross-encoder")
        rank("What is a fovea?", ["A part of the retina.", "A city."])
        # [{"index": 0, "score": 0.98, "text": "A part of the retina."}, {"index": 1, ...}]

    path_or_model, tokenizer: as TextClassifier's.
    """

    def __init__(
        self, path_or_model: str | Path | nn.Module, tokenizer: Tokenizer | None = None, **options: Any
    ) -> None:
        """options: device, dtype, quantization and progress, see `load_model`."""
        labels = ["relevance"] if isinstance(path_or_model, nn.Module) else None
        self._classifier = TextClassifier(path_or_model, tokenizer, labels, **options)
        self.tokenizer = self._classifier.tokenizer
        if len(self._classifier.labels) != 1:
            raise ValueError(
                f"{path_or_model} has {len(self._classifier.labels)} outputs; a reranker has one: use foveate.TextClassifier"
            )

    def __call__(
        self, query: str, documents: Sequence[str], *, top_k: int | None = None, raw: bool = False, batch_size: int = 8
    ) -> list[dict[str, Any]]:
        """{"index", "score", "text"} of the top_k documents (all if None), best first; index: the place in `documents`.

        score: sigmoid of the model's output, between 0 and 1, or with raw the output itself. ValueError for a pair longer than the
        model's positions; it is not cut.
        """
        if not isinstance(query, str):
            raise TypeError(f"the query is a {type(query).__name__}, not a str")
        if isinstance(documents, str):
            raise TypeError("documents is a str; pass a list of texts")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be 1 or more")
        texts = as_texts(documents, "document")
        logits = self._classifier.logits([(query, text) for text in texts], batch_size=batch_size)[:, 0]
        scores = (logits if raw else logits.sigmoid()).tolist()
        order = sorted(range(len(texts)), key=lambda i: -float(logits[i]))
        return [{"index": i, "score": scores[i], "text": texts[i]} for i in order[:top_k]]

    def scores(self, pairs: Sequence[tuple[str, str]], *, batch_size: int = 8) -> list[float]:
        """The score of each pair (query, document), in their order."""
        return self._classifier.logits(list(pairs), batch_size=batch_size)[:, 0].sigmoid().tolist()
