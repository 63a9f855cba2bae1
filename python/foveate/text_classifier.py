"""TextClassifier: the class of a text with BERT, as transformers' pipeline("text-classification") finds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models import load_model, open_checkpoint
from foveate.models.packed import Packed
from foveate.tokenizer import Tokenizer


class TextClassifier:
    """Sorts texts, or pairs of texts, into the classes that a BERT was fine-tuned for.

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
        if isinstance(path_or_model, nn.Module):
            self.model: Any = path_or_model
        else:
            checkpoint = open_checkpoint(path_or_model)
            config = checkpoint.config
            if config.get("model_type") != "bert":
                raise ValueError(
                    f"{path_or_model} is of architecture {config.get('model_type')!r}; classification needs 'bert', fine-tuned for it"
                )
            if config.get("problem_type") not in (None, "single_label_classification"):
                raise ValueError(
                    f"{path_or_model} has the problem_type {config['problem_type']!r}; only one label for a text is supported"
                )
            self.model = load_model(
                checkpoint, device=device, dtype=dtype, quantization=quantization, progress=progress,
                head="sequence-classification",
            )  # fmt: skip
            tokenizer = tokenizer or checkpoint.tokenizer()
            known = config.get("id2label") or {}
            labels = labels or [known.get(str(i), f"LABEL_{i}") for i in range(self.model.config.num_labels)]
        if tokenizer is None:
            raise ValueError(f"there is no tokenizer: {path_or_model} has no tokenizer.json; pass tokenizer=")
        if labels is None or len(labels) != self.model.config.num_labels:
            found = "none" if labels is None else len(labels)
            raise ValueError(f"the model has {self.model.config.num_labels} classes, and there are {found} labels")
        self.tokenizer, self.labels = tokenizer, list(labels)

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        top_k: int = 1,
        batch_size: int = 8,
    ) -> Any:
        """{"label", "score"} of the most probable class, with top_k > 1 a list of up to top_k of them; for a list of texts a list.

        text_pair: the second text of each, for models that compare two. score: the softmax over all classes. batch_size: texts in one
        forward pass, which are packed, so none changes another's score. ValueError for a text longer than the model's positions; it
        is not cut.
        """
        texts = [text] if isinstance(text, str) else list(text)
        inputs: list[Any] = texts
        if text_pair is not None:
            pairs = [text_pair] if isinstance(text_pair, str) else list(text_pair)
            if len(pairs) != len(texts):
                raise ValueError(f"there are {len(texts)} texts and {len(pairs)} second texts")
            inputs = list(zip(texts, pairs))
        for name, value in {"top_k": top_k, "batch_size": batch_size}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        results: list[Any] = []
        for at in range(0, len(inputs), batch_size):
            for row in self._logits(inputs[at : at + batch_size]).softmax(-1):
                best = row.topk(min(top_k, len(self.labels)))
                found = [
                    {"label": self.labels[i], "score": score}
                    for score, i in zip(best.values.tolist(), best.indices.tolist())
                ]
                results.append(found[0] if top_k == 1 else found)
        return results[0] if isinstance(text, str) else results

    @torch.inference_mode()
    def _logits(self, inputs: list[Any]) -> Tensor:
        """fp32 [texts, classes]"""
        encodings = self.tokenizer.backend.encode_batch(inputs)
        device = next(self.model.parameters()).device
        ids = torch.tensor([i for e in encodings for i in e.ids], device=device)
        types = torch.tensor([i for e in encodings for i in e.type_ids], device=device)
        packed = Packed.of([len(e.ids) for e in encodings]).to(device)
        return self.model(ids[None], types[None], packed=packed).float()
