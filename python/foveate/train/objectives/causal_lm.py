"""Causal language modelling: each token from those before it; for chats and prompts only the replies count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data import chat
from foveate.train.data.batch import IGNORED, Batch, join, layout
from foveate.train.data.chat_template import end_of_turn
from foveate.train.data.examples import Columns, Example, Examples, Parts, length_notes, too_long
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Objective
from foveate.train.objectives.head import head_loss, scaled

_PASSED_OVER = 2  # in the column "first"
_CHAT = 2  # in the column "whole"
_WHAT = "chats or prompts"


class CausalLM(Objective):
    """Rows: {"text"}; {"prompt", "completion"}; or {"messages": [{"role", "content"}, ...]}, rendered by the chat template.

    The end token follows each text and completion. Texts longer than max_length are cut into examples that share one token, so that
    every token but the first is predicted once; chats and prompts are not. A chat may give several sequences, see `conversations`.
    """

    perplexity = True

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length

    def signature(self) -> dict[str, Any]:
        return {"text_field": self.config.text_field}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """tokens int32; target uint8, 1 where the token is to be predicted; whole uint8 [1], 1 for a prompt with its completion and 2
        for a chat, which are not cut into examples; first uint8 [1], 1 for the first sequence of a row, 2 if
        the row has a chat or a completion beside its text."""
        samples, first = [], []
        for row in rows:
            found = chat.samples(row, self.config.text_field, self.tokenizer)
            samples += found
            passed_over = self.config.text_field is not None and chat.has_more(row, self.config.text_field)
            first += [_PASSED_OVER if passed_over else 1] + [0] * (len(found) - 1)
        backend, end_id = self.tokenizer.backend, min(self.tokenizer.eos_ids, default=None)
        encodings: list[Any] = [None] * len(samples)
        for rendered in (False, True):
            picked = [i for i, sample in enumerate(samples) if sample.rendered == rendered]
            batch = backend.encode_batch([samples[i].text for i in picked], add_special_tokens=not rendered)
            for i, encoding in zip(picked, batch):
                encodings[i] = encoding
        columns: Columns = {"tokens": [], "target": [], "whole": [], "first": [np.array([x], np.uint8) for x in first]}
        for sample, encoding in zip(samples, encodings):
            tokens, target = chat.tokens_of(sample, encoding, backend, end_id)
            columns["tokens"].append(np.array(tokens, np.int32))
            columns["target"].append(np.array(target, np.uint8))
            columns["whole"].append(np.array([_CHAT if sample.rendered else sample.spans is not None], np.uint8))
        return columns

    def examples(self, store: TokenStore) -> Examples:
        whole, inputs, taught = self._documents(store)
        too_long(self.config, inputs[whole > 0], self.max_length, _WHAT)
        if not taught.any() and (whole > 0).any():
            raise ValueError(
                "all labels are ignored: no row has a token to be predicted; do the chats have replies, the prompts completions?"
            )
        return cut(np.where(taught, self._read(whole, inputs), 0), self.max_length)

    def notes(self, store: TokenStore) -> list[str]:
        whole, inputs, taught = self._documents(store)
        passed_over = int((store.values("first") == _PASSED_OVER).sum()) if len(store) else 0
        found = []
        if passed_over:
            found.append(
                f"the messages or completions of {passed_over} rows are not read, as text_field={self.config.text_field!r} is given"
            )
        found += length_notes(self.config, inputs[whole > 0], self.max_length, _WHAT)
        if not taught.all():
            found.append(f"{int((~taught).sum())} of {len(store)} texts have no token to be predicted and are left out")
        return found

    def parts(self, store: TokenStore) -> Parts:
        default = super().parts(store)
        if not len(store):
            return default
        return default._replace(
            groups=np.cumsum(store.values("first") > 0, dtype=np.int64), divisible=store.values("whole") == 0
        )

    def end_of_turn(self, store: TokenStore) -> int | None:
        """The token that ends a reply of the chats in the data, None where there are none."""
        chats = bool(len(store)) and bool((store.values("whole") == _CHAT).any())
        return end_of_turn(self.tokenizer) if chats else None

    def _read(self, whole: np.ndarray, inputs: np.ndarray) -> np.ndarray:
        """How many tokens of each document are read."""
        longer = (whole > 0) & (inputs > self.max_length)
        return np.where(longer, self.max_length if self.config.too_long == "truncate" else 0, np.maximum(inputs, 0))

    def _documents(self, store: TokenStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each: `whole`, how many tokens it could read, and whether one of those that it reads predicts the next."""
        if not len(store):
            empty = np.empty(0, np.int64)
            return empty, empty, empty.astype(bool)
        whole, inputs = store.values("whole"), store.lengths("tokens") - 1
        read = self._read(whole, inputs)
        taught = read > 0
        for d in np.flatnonzero(taught & (whole > 0)):
            taught[d] = store.get("target", d)[1 : 1 + read[d]].any()
        # one that is too long and left out teaches too: it is counted as such
        return whole, inputs, taught | ((whole > 0) & (inputs > self.max_length) & (read == 0))

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        inputs, labels = [], []
        for example in examples:
            end = example.start + example.length + 1
            tokens = store.get("tokens", example.document)[example.start : end]
            target = store.get("target", example.document)[example.start + 1 : end]
            inputs.append(tokens[:-1])
            labels.append(np.where(target, tokens[1:], IGNORED))
        lengths = [len(x) for x in inputs]
        packed, _ = layout(lengths, self.config.packing)
        tensors = {"tokens": join(inputs, self.config.packing), "labels": join(labels, self.config.packing, IGNORED)}
        return Batch(tensors, packed, int((tensors["labels"] != IGNORED).sum()), sum(lengths))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        # padding on the right needs no mask: no token sees what comes after it
        hidden = model.hidden(batch["tokens"], packed=batch.packed.get("tokens"))
        hidden, options = scaled(model, hidden)
        return head_loss(model.lm_head, hidden, batch["labels"], self.config, **options)


def cut(lengths: np.ndarray, longest: int) -> Examples:
    """Documents of `lengths` tokens in examples of up to `longest`; none of those without tokens."""
    count = -(-lengths // longest)
    documents = np.repeat(np.arange(len(lengths)), count)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(count) - count, count)) * longest
    return Examples(documents, starts, np.minimum(lengths[documents] - starts, longest))
