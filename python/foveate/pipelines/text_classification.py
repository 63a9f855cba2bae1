"""TextClassifier: the class of a text with BERT, as transformers' pipeline("text-classification") finds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict, overload

import torch
from torch import Tensor, nn

from foveate.pipelines.encoder import as_texts, load_encoder, run_packed
from foveate.tokenizer import Tokenizer

# How a config's problem_type says that scores are made of logits.
_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "single_label_classification": lambda logits: logits.softmax(-1),
    "multi_label_classification": torch.sigmoid,
    "regression": lambda logits: logits,
}


class ClassScore(TypedDict):
    """A class and how likely it is."""

    label: str
    score: float


class TextClassifier:
    """Classifies texts, or pairs of texts, by the classes that a BERT was fine-tuned for.

        classify = TextClassifier("path to a BERT with a sequence classification head")
        classify("I liked it.")                     # {"label": "positive", "score": 0.98}
        classify(["It was fine.", "Never again."], top_k=2)

    path_or_model: what `load_model` takes, or a BertForSequenceClassification together with its tokenizer and labels, the names of
    the classes in the order of their numbers.
    """

    def __init__(
        self,
        path_or_model: str | Path | nn.Module,
        tokenizer: Tokenizer | None = None,
        labels: Sequence[str] | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantization: str | None = None,
        progress: bool | None = None,
    ) -> None:
        loaded = load_encoder(
            path_or_model, tokenizer, task="classification", head="sequence-classification",
            device=device, dtype=dtype, quantization=quantization, progress=progress,
        )  # fmt: skip
        problem = loaded.config.get("problem_type")
        if problem is not None and problem not in _SCORES:
            raise ValueError(f"{path_or_model} has the problem_type {problem!r}; known are {', '.join(_SCORES)}")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        if labels is None and loaded.config:
            labels = loaded.labels
        if labels is None or len(labels) != self.model.config.num_labels:
            found = "none" if labels is None else len(labels)
            raise ValueError(f"the model has {self.model.config.num_labels} classes, and there are {found} labels")
        self.labels = list(labels)
        if problem is None:  # softmax over one output would be 1 whatever the text
            problem = "multi_label_classification" if len(self.labels) == 1 else "single_label_classification"
        self.scores = _SCORES[problem]

    @overload
    def __call__(self, text: str, text_pair: str | None = None, *, batch_size: int = 8) -> ClassScore: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(
        self, text: Sequence[str], text_pair: Sequence[str] | None = None, *, batch_size: int = 8
    ) -> list[ClassScore]: ...
    @overload
    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        top_k: int,
        batch_size: int = 8,
    ) -> ClassScore | list[ClassScore] | list[list[ClassScore]]: ...
    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        top_k: int = 1,
        batch_size: int = 8,
    ) -> ClassScore | list[ClassScore] | list[list[ClassScore]]:
        """{"label", "score"} of the most probable class, with top_k > 1 a list of up to top_k of them; for a list of texts a list.

        text_pair: the second text of each, for models that compare two. score: the softmax over all classes; the sigmoid for a model
        of one output and where the config's problem_type is "multi_label_classification"; the output itself where it is
        "regression". batch_size: texts in one forward pass, which are packed, so none changes another's score. ValueError for a text
        longer than the model's positions; it is not cut.
        """
        texts = as_texts(text)
        inputs: list[Any] = texts
        if text_pair is not None:
            pairs = as_texts(text_pair, "the second text")
            if len(pairs) != len(texts):
                raise ValueError(f"there are {len(texts)} texts and {len(pairs)} second texts")
            inputs = list(zip(texts, pairs))
        if top_k < 1:
            raise ValueError(f"top_k={top_k} must be 1 or more")
        results: list[Any] = []
        for row in self.scores(self.logits(inputs, batch_size=batch_size)):
            best = row.topk(min(top_k, len(self.labels)))
            found: list[ClassScore] = [
                {"label": self.labels[i], "score": score}
                for score, i in zip(best.values.tolist(), best.indices.tolist())
            ]
            results.append(found[0] if top_k == 1 else found)
        return results[0] if isinstance(text, str) else results

    def logits(self, inputs: Sequence[str | tuple[str, str]], *, batch_size: int = 8) -> Tensor:
        """fp32 [texts, classes] on the CPU, of texts or pairs of texts."""
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be 1 or more")
        rows = [torch.empty(0, len(self.labels))]
        for at in range(0, len(inputs), batch_size):
            encodings = self.tokenizer.backend.encode_batch(list(inputs[at : at + batch_size]))
            logits, _ = run_packed(
                self.model, encodings, lambda ids, types, packed: self.model(ids, types, packed=packed)
            )
            rows.append(logits.float().cpu())
        return torch.cat(rows)
