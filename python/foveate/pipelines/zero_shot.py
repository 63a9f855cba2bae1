"""ZeroShotClassifier: classes that are named at the call, with a model of entailment, as pipeline("zero-shot-classification")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, overload

import torch
from torch import nn

from foveate.pipelines.encoder import as_texts
from foveate.pipelines.text_classification import TextClassifier
from foveate.tokenizer import Tokenizer


class Ranking(TypedDict):
    """The labels of a text with their scores, best first."""

    sequence: str
    labels: list[str]
    scores: list[float]


class ZeroShotClassifier:
    """Asks for each label whether the text entails a sentence with it (Yin et al. 2019, arXiv 1909.00161).

        classify = ZeroShotClassifier("path to a BERT fine-tuned on natural language inference")
        classify("I have a problem with my phone.", candidate_labels=["technology", "sports"])
        # {"sequence": ..., "labels": ["technology", "sports"], "scores": [0.97, 0.03]}

    path_or_model, tokenizer, labels: as TextClassifier's. One of the labels must begin with "entail".
    """

    def __init__(
        self,
        path_or_model: str | Path | nn.Module,
        tokenizer: Tokenizer | None = None,
        labels: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """options: device, dtype, quantization and progress, see `load_model`."""
        self._classifier = TextClassifier(path_or_model, tokenizer, labels, **options)
        names = self._classifier.labels
        entailment = [i for i, name in enumerate(names) if name.lower().startswith("entail")]
        if not entailment or len(names) < 2:
            raise ValueError(
                f"the classes of {path_or_model} are {', '.join(names)}; zero-shot classification needs a model of natural language "
                "inference, with a class whose name begins with 'entail'"
            )
        self._entailment = entailment[0]
        contradiction = [i for i, name in enumerate(names) if name.lower().startswith("contradict")]
        fallback = len(names) - 1 if self._entailment == 0 else 0
        self._contradiction = contradiction[0] if contradiction else fallback

    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, sequences: str, candidate_labels: str | Sequence[str], *,
        hypothesis_template: str = ..., multi_label: bool = ..., batch_size: int = ...,
    ) -> Ranking: ...  # fmt: skip
    @overload
    def __call__(
        self, sequences: Sequence[str], candidate_labels: str | Sequence[str], *,
        hypothesis_template: str = ..., multi_label: bool = ..., batch_size: int = ...,
    ) -> list[Ranking]: ...  # fmt: skip
    def __call__(
        self,
        sequences: str | Sequence[str],
        candidate_labels: str | Sequence[str],
        *,
        hypothesis_template: str = "This example is {}.",
        multi_label: bool = False,
        batch_size: int = 8,
    ) -> Ranking | list[Ranking]:
        """{"sequence", "labels", "scores"}, best first; for a list of sequences a list.

        candidate_labels: a list, or one text with commas. Scores are the softmax of the entailment logits over the labels, or with
        multi_label (and for a single label) of entailment against contradiction for each label by itself. ValueError for a template
        without {} and for no labels.
        """
        names = (
            candidate_labels.split(",") if isinstance(candidate_labels, str) else as_texts(candidate_labels, "label")
        )
        names = [name.strip() for name in names]
        if not names or not all(names):
            raise ValueError(f"candidate_labels={candidate_labels!r} must name one label or more, none of them empty")
        if hypothesis_template.format("a") == hypothesis_template:
            raise ValueError(f"hypothesis_template={hypothesis_template!r} has no {{}} where the label goes")
        hypotheses = [hypothesis_template.format(name) for name in names]
        texts = as_texts(sequences)
        pairs = [(text, hypothesis) for text in texts for hypothesis in hypotheses]
        logits = self._classifier.logits(pairs, batch_size=batch_size).view(len(texts), len(names), -1)
        if multi_label or len(names) == 1:
            scores = logits[..., [self._contradiction, self._entailment]].softmax(-1)[..., 1]
        else:
            scores = logits[..., self._entailment].softmax(-1)
        results: list[Ranking] = []
        for text, row in zip(texts, scores):
            order = torch.argsort(row, descending=True, stable=True).tolist()
            results.append({"sequence": text, "labels": [names[i] for i in order], "scores": row[order].tolist()})
        return results[0] if isinstance(sequences, str) else results
