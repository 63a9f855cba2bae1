"""Masked language modelling (Devlin et al. 2018, arXiv 1810.04805): hidden tokens from those on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from foveate.ops.cross_entropy import cross_entropy
from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data.batch import IGNORED, Batch, join, layout
from foveate.train.data.examples import Columns, Example, Examples, Parts, empty_notes, text_of
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Objective
from foveate.train.objectives.causal_lm import cut
from foveate.train.objectives.head import head_loss


class MaskedLM(Objective):
    """Rows: {"text"}, cut into examples of max_length with [CLS] and [SEP] around each.

    mask_share of a example's tokens, one at least, are to be predicted; 80 % of them are replaced by [MASK], 10 % by a random token,
    10 % stay. With whole_word all tokens of a word are hidden or none is; words are taken at random until the share is reached.
    Masks are drawn anew in each pass over the data.
    """

    perplexity = True
    head = "masked-lm"

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        frame = tokenizer.backend.encode("").ids
        if len(frame) != 2:
            raise ValueError(
                f"the tokenizer frames a text with the ids {frame}; masked-lm needs two of them, [CLS] and [SEP]"
            )
        self._frame = np.array(frame, np.int32)
        mask = tokenizer.special.get("mask_token", "[MASK]")
        self._mask_id = tokenizer.backend.token_to_id(mask)
        if self._mask_id is None:
            raise ValueError(f"the tokenizer has no mask token {mask!r}, which masked-lm needs")
        special = {i for i, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
        self._random = np.array([i for i in range(tokenizer.vocab_size) if i not in special], np.int32)

    def signature(self) -> dict[str, Any]:
        return {"text_field": self.config.text_field}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """tokens int32; begins uint8, 1 at the first token of each word."""
        texts = [text_of(row, self.config.text_field or "text") for row in rows]
        encodings = self.tokenizer.backend.encode_batch(texts, add_special_tokens=False)
        words = [np.array([-1 if word is None else word for word in e.word_ids]) for e in encodings]
        return {
            "tokens": [np.array(e.ids, np.int32) for e in encodings],
            "begins": [np.diff(word, prepend=-2).astype(bool).astype(np.uint8) for word in words],
        }

    def examples(self, store: TokenStore) -> Examples:
        found = cut(store.lengths("tokens") if len(store) else np.empty(0, np.int64), self.max_length - 2)
        return found._replace(lengths=found.lengths + 2)

    def notes(self, store: TokenStore) -> list[str]:
        return empty_notes(store.lengths("tokens") < 1) if len(store) else []

    def parts(self, store: TokenStore) -> Parts:
        return super().parts(store)._replace(divisible=np.ones(len(store), bool))

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        inputs, labels = [], []
        for example in examples:
            part = slice(example.start, example.start + example.length - 2)
            tokens = store.get("tokens", example.document)[part]
            begins = store.get("begins", example.document)[part]
            changed, target = self.hide(tokens, begins, np.random.default_rng([self.config.seed, *example.rng_key]))
            inputs.append(np.concatenate([self._frame[:1], changed, self._frame[1:]]))
            labels.append(np.concatenate([[IGNORED], target, [IGNORED]]))
        packing = self.config.packing
        packed, lens = layout([example.length for example in examples], packing)
        tensors = {"tokens": join(inputs, packing), "labels": join(labels, packing, IGNORED), **lens}
        return Batch(
            tensors, packed, int((tensors["labels"] != IGNORED).sum()), sum(example.length for example in examples)
        )

    def hide(self, tokens: np.ndarray, begins: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The tokens as the model sees them, and the labels."""
        wanted = max(1, round(self.config.mask_share * len(tokens)))
        groups = np.cumsum(np.concatenate([[1], begins[1:]])) - 1 if self.config.whole_word else np.arange(len(tokens))
        order = rng.permutation(int(groups[-1]) + 1)
        sizes = np.bincount(groups)[order]
        chosen = order[: 1 + int(np.searchsorted(np.cumsum(sizes), wanted))]
        hidden = np.isin(groups, chosen)
        draw = rng.random(len(tokens))
        changed = np.where(hidden & (draw < 0.8), self._mask_id, tokens)
        replaced = hidden & (draw >= 0.8) & (draw < 0.9)
        changed = np.where(replaced, rng.choice(self._random, len(tokens)), changed)
        return changed, np.where(hidden, tokens, IGNORED)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        selected, labels = self._selected(model, batch)
        return head_loss(model.decoder, selected, labels, self.config)

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        selected, labels = self._selected(model, batch)
        logits = model.decoder(selected)
        return {"loss": cross_entropy(logits, labels, reduction="sum"), "accuracy": (logits.argmax(-1) == labels).sum()}

    def _selected(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the decoder is applied to, at the hidden tokens only: [hidden tokens, hidden size], and their labels."""
        at = batch["labels"] != IGNORED
        return model.transform(model.bert(batch["tokens"], **batch.padding())[at]), batch["labels"][at]
