"""Sequence to sequence with an encoder-decoder, T5 or BART's kin: rows of source and target, and T5's span corruption."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.models.encoder_decoder import DecoderCache
from foveate.models.encoder_decoder_families import FAMILIES
from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data.batch import IGNORED, Batch, join, layout
from foveate.train.data.examples import Columns, Example, Examples, Parts, empty_notes, length_notes, text_of, too_long
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Objective
from foveate.train.objectives.causal_lm import cut
from foveate.train.objectives.head import head_loss

_WHAT = "sources or targets"


class Seq2Seq(Objective):
    """Rows: {"source", "target"}, with what the tokenizer adds to texts (BART's <s>); the end token follows both.

    Neither is cut but by too_long="truncate", a target then without its end.
    """

    perplexity = True

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int, settings: dict[str, Any]) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        if not tokenizer.eos_ids:
            raise ValueError("the tokenizer has no end token, without which an output would never end")
        self.end_id = min(tokenizer.eos_ids)
        family = FAMILIES.get(settings.get("model_type", ""))
        named = {name: value for name, value in settings.items() if value is not None}
        settings = {**(family.defaults if family else {}), **named}
        pad = settings.get("pad_token_id") or 0
        start = settings.get("decoder_start_token_id")
        self.start_id = pad if start is None else start

    def signature(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """source and target int32."""
        columns: Columns = {}
        for name in ("source", "target"):
            texts = [text_of(row, name, "") for row in rows]
            encodings = self.tokenizer.backend.encode_batch(texts)
            columns[name] = [np.array(self._ended(e.ids), np.int32) for e in encodings]
        return columns

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] in self.tokenizer.eos_ids else [*ids, self.end_id]

    def examples(self, store: TokenStore) -> Examples:
        if not len(store):
            return cut(np.empty(0, np.int64), self.max_length)
        source, target = store.lengths("source"), store.lengths("target")
        longer = too_long(self.config, np.maximum(source, target), self.max_length, _WHAT)
        if self.config.too_long == "truncate":
            return cut(np.minimum(source, self.max_length), self.max_length)
        return cut(np.where(longer, 0, source), self.max_length)

    def notes(self, store: TokenStore) -> list[str]:
        if not len(store):
            return []
        lengths = np.maximum(store.lengths("source"), store.lengths("target"))
        return length_notes(self.config, lengths, self.max_length, _WHAT)

    def pair(self, store: TokenStore, example: Example) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of an example."""
        source, target = store.get("source", example.document), store.get("target", example.document)
        if len(source) > self.max_length:
            source = np.append(source[: self.max_length - 1], np.int32(self.end_id))
        return source, target[: self.max_length]

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        pairs = [self.pair(store, example) for example in examples]
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        inputs = [np.concatenate([[self.start_id], target[:-1]]) for target in targets]
        packing = self.config.packing
        packed, tensors = layout([len(x) for x in sources], packing, "source")
        packed |= layout([len(x) for x in targets], packing, "target")[0]
        tensors |= {
            "source": join(sources, packing), "inputs": join(inputs, packing), "labels": join(targets, packing, IGNORED),
        }  # fmt: skip
        target_count = sum(map(len, targets))
        return Batch(tensors, packed, target_count, target_count + sum(map(len, sources)))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        source, target = batch.packed.get("source"), batch.packed.get("target")
        mask = None
        if source is None:
            places = torch.arange(batch["source"].shape[1], device=batch["source"].device)
            mask = places < batch["source_lens"][:, None]
        encoded = model.encode(batch["source"], mask, source)
        cache = DecoderCache(model, encoded, mask, keep=False, packed=source)
        hidden, options = model.decode(batch["inputs"], cache, target), {}
        if model.logits_bias is not None:
            options["bias"] = model.logits_bias
        return head_loss(model.lm_head, hidden, batch["labels"], self.config, **options)


class SpanCorruption(Seq2Seq):
    """T5's pre-training (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4). Rows: {"text"}, cut into examples.

    mask_share of an example's tokens lie in spans of mean length span_length, at random places. The source has a sentinel,
    <extra_id_0>, <extra_id_1>, ..., instead of each span; the target is each sentinel and the span that it stands for.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int, settings: dict[str, Any]) -> None:
        super().__init__(config, tokenizer, max_length, settings)
        self.length = self._longest_text(max_length)
        spans = self._spans(self.length)[1]
        ids = [tokenizer.backend.token_to_id(f"<extra_id_{i}>") for i in range(spans)]
        if None in ids:
            raise ValueError(
                f"the tokenizer lacks <extra_id_{ids.index(None)}>, and examples of {self.length} tokens need {spans} sentinels; lower "
                "max_length or mask_share, or raise span_length"
            )
        self._sentinels = np.array(ids, np.int32)

    def _spans(self, length: int) -> tuple[int, int]:
        """How many tokens of a text are hidden, and in how many spans."""
        hidden = min(max(1, round(self.config.mask_share * length)), length - 1)
        spans = min(max(1, round(hidden / self.config.span_length)), hidden, length - hidden)
        return hidden, spans

    def _longest_text(self, max_length: int) -> int:
        """The longest text of which neither source nor target, with sentinels and end token, is longer than max_length."""
        for length in range(2 * max_length, 1, -1):
            hidden, spans = self._spans(length)
            if max(length - hidden, hidden) + spans + 1 <= max_length:
                return length
        raise ValueError(
            f"max_length={max_length} leaves no room for a text beside a sentinel and the end token; raise it"
        )

    def signature(self) -> dict[str, Any]:
        return {"text_field": self.config.text_field}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """tokens int32"""
        texts = [text_of(row, self.config.text_field or "text") for row in rows]
        encodings = self.tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        return {"tokens": [np.array(e.ids, np.int32) for e in encodings]}

    def examples(self, store: TokenStore) -> Examples:
        found = cut(store.lengths("tokens") if len(store) else np.empty(0, np.int64), self.length)
        enough = found.lengths > 1  # nothing is left to see of a single hidden token
        documents, starts, lengths = (values[enough] for values in found)
        # Rows are packed by the length of the source.
        return Examples(documents, starts, np.array([self._source_length(int(n)) for n in lengths], np.int64))

    def notes(self, store: TokenStore) -> list[str]:
        return empty_notes(store.lengths("tokens") < 2) if len(store) else []

    def parts(self, store: TokenStore) -> Parts:
        return super().parts(store)._replace(divisible=np.ones(len(store), bool))

    def _source_length(self, length: int) -> int:
        hidden, spans = self._spans(length)
        return length - hidden + spans + 1

    def pair(self, store: TokenStore, example: Example) -> tuple[np.ndarray, np.ndarray]:
        tokens = store.get("tokens", example.document)[example.start : example.start + self.length]
        return self.corrupt(tokens, np.random.default_rng([self.config.seed, *example.rng_key]))

    def corrupt(self, tokens: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        hidden, spans = self._spans(len(tokens))
        # between two spans a token is seen; before the first and after the last there may be none
        seen_lengths = _partition(len(tokens) - hidden + 2, spans + 1, rng)
        seen_lengths[0] -= 1
        seen_lengths[-1] -= 1
        hidden_lengths = _partition(hidden, spans, rng)
        source, target = [], []
        at = 0
        for sentinel, seen, unseen in zip(self._sentinels[:spans, None], seen_lengths, hidden_lengths):
            source += [tokens[at : at + seen], sentinel]
            target += [sentinel, tokens[at + seen : at + seen + unseen]]
            at += seen + unseen
        end = np.array([self.end_id], np.int32)
        return np.concatenate([*source, tokens[at:], end]), np.concatenate([*target, end])


def _partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """`total` as a sum of `parts` numbers of at least 1, each such sum equally probable."""
    ends = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], ends, [total]])).astype(int).tolist()
