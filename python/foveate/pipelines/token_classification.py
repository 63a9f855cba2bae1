"""TokenClassifier: the class of each token or word with BERT, as transformers' pipeline("token-classification") finds it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.pipelines.encoder import TOKENS_PER_BATCH, as_texts, batches, load_encoder, run_packed
from foveate.tokenizer import Tokenizer

_STRATEGIES = ("none", "simple", "first", "average", "max")


class TokenClassifier:
    """Finds names, places or parts of speech with a BERT that was fine-tuned for them.

        tag = TokenClassifier("path to a BERT with a token classification head", aggregation_strategy="simple")
        tag("Ada lives in London.")
        # [{"entity_group": "PER", "score": 0.99, "word": "ada", "start": 0, "end": 3}, ...]

    path_or_model: what `load_model` takes, or a BertForTokenClassification together with its tokenizer and labels.
    aggregation_strategy: "none" gives every token; "simple" joins neighbours of one class, a new B- tag beginning a new group;
    "first", "average" and "max" give each word the class of its first token, of the mean of its tokens' probabilities, or of its most
    certain token, and then join neighbouring words.
    """

    def __init__(
        self,
        path_or_model: str | Path | nn.Module,
        tokenizer: Tokenizer | None = None,
        labels: Sequence[str] | None = None,
        *,
        aggregation_strategy: str = "none",
        ignore_labels: Sequence[str] = ("O",),
        **options: Any,
    ) -> None:
        """options: device, dtype, quantization and progress, see `load_model`."""
        loaded = load_encoder(
            path_or_model, tokenizer, task="token classification", head="token-classification", **options
        )
        if labels is None and not loaded.config:
            raise ValueError(f"the model has {loaded.model.config.num_labels} classes; pass their labels")
        self.model, self.tokenizer = loaded.model, loaded.tokenizer
        self.labels = list(labels) if labels is not None else loaded.labels
        if len(self.labels) != self.model.config.num_labels:
            raise ValueError(
                f"the model has {self.model.config.num_labels} classes, and there are {len(self.labels)} labels"
            )
        self.aggregation_strategy = _checked_strategy(aggregation_strategy)
        self.ignore_labels = tuple(ignore_labels)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        aggregation_strategy: str | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> list[Any]:
        """The entities of a text, or of each of a list of texts; those of ignore_labels are omitted.

        "none": {"entity", "score", "index", "word", "start", "end"} of each token; else {"entity_group", "score", "word", "start",
        "end"} of each group, with text[start:end] in the words of the text and the mean score of its members. Texts are packed, so
        none changes another's result. ValueError for a text longer than the model's positions; it is not cut.
        """
        strategy = (
            self.aggregation_strategy if aggregation_strategy is None else _checked_strategy(aggregation_strategy)
        )
        texts = as_texts(text)
        encodings = self.tokenizer.backend.encode_batch(texts)
        results: list[Any] = [None] * len(texts)
        for batch in batches([len(e.ids) for e in encodings], tokens_per_batch):
            logits, packed = run_packed(
                self.model,
                [encodings[i] for i in batch],
                lambda ids, types, packed: self.model(ids, types, packed=packed),
            )
            scores = logits[0].float().softmax(-1).cpu().split(packed.cu_seqlens.diff().tolist())
            for i, rows in zip(batch, scores):
                results[i] = self._entities(texts[i], encodings[i], rows, strategy)
        return results[0] if isinstance(text, str) else results

    def _entities(self, text: str, encoding: Any, scores: Tensor, strategy: str) -> list[dict[str, Any]]:
        tokens = self._tokens(text, encoding, scores)
        if strategy == "none":
            found = [self._token_entity(token) for token in tokens]
            return [entity for entity in found if entity["entity"] not in self.ignore_labels]
        entities = (
            [self._token_entity(token) for token in tokens]
            if strategy == "simple"
            else [self._word_entity(word, strategy) for word in _words(tokens)]
        )
        groups = [self._group(group) for group in _groups(entities)]
        return [group for group in groups if group["entity_group"] not in self.ignore_labels]

    def _tokens(self, text: str, encoding: Any, scores: Tensor) -> list[dict[str, Any]]:
        backend = self.tokenizer.backend
        prefix = getattr(backend.model, "continuing_subword_prefix", None)
        unknown = getattr(backend.model, "unk_token", None)
        tokens = []
        for i, (start, end) in enumerate(encoding.offsets):
            if encoding.special_tokens_mask[i]:
                continue
            word, of_text = encoding.tokens[i], text[start:end]
            if prefix:
                continues = len(word) != len(of_text)
            else:  # such tokenizers do not mark words; text without a space before it continues one
                continues = start > 0 and " " not in text[start - 1 : start + 1]
            if word == unknown:
                word, continues = of_text, False
            tokens.append(
                {"word": word, "scores": scores[i], "start": start, "end": end, "index": i, "continues": continues}
            )
        return tokens

    def _token_entity(self, token: dict[str, Any]) -> dict[str, Any]:
        score, label = token["scores"].max(-1)
        entity = {"entity": self.labels[int(label)], "score": float(score), "index": token["index"]}
        return entity | {key: token[key] for key in ("word", "start", "end")}

    def _word_entity(self, word: list[dict[str, Any]], strategy: str) -> dict[str, Any]:
        if strategy == "first":
            scores = word[0]["scores"]
        elif strategy == "max":
            scores = max(word, key=lambda token: float(token["scores"].max()))["scores"]
        else:
            scores = torch.stack([token["scores"] for token in word]).mean(0)
        score, label = scores.max(-1)
        return {"entity": self.labels[int(label)], "score": float(score), "word": self._text(word)} | _span(word)

    def _group(self, entities: list[dict[str, Any]]) -> dict[str, Any]:
        score = sum(entity["score"] for entity in entities) / len(entities)
        name = entities[0]["entity"].split("-", 1)[-1]
        return {"entity_group": name, "score": score, "word": self._text(entities)} | _span(entities)

    def _text(self, entities: list[dict[str, Any]]) -> str:
        return self.tokenizer.backend.decoder.decode([entity["word"] for entity in entities])


def _checked_strategy(name: str) -> str:
    if name not in _STRATEGIES:
        raise ValueError(f"aggregation_strategy={name!r} is not one of {', '.join(_STRATEGIES)}")
    return name


def _span(entities: list[dict[str, Any]]) -> dict[str, int]:
    return {"start": entities[0]["start"], "end": entities[-1]["end"]}


def _words(tokens: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    words: list[list[dict[str, Any]]] = []
    for token in tokens:
        if token["continues"] and words:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _groups(entities: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Neighbours of one class, whether B- or I-; B- begins a new group (Ramshaw and Marcus 1995, arXiv cmp-lg/9505040)."""
    groups: list[list[dict[str, Any]]] = []
    last = None
    for entity in entities:
        name = entity["entity"]
        begins, tag = name.startswith("B-"), name[2:] if name.startswith(("B-", "I-")) else name
        if groups and tag == last and not begins:
            groups[-1].append(entity)
        else:
            groups.append([entity])
        last = tag
    return groups
