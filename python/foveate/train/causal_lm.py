"""Causal language modelling: each token from those before it; for chats and prompts only the replies count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.loss import linear_cross_entropy
from foveate.tokenizer import Tokenizer
from foveate.train import chat
from foveate.train.batch import IGNORED, Batch, join, layout
from foveate.train.config import TrainConfig
from foveate.train.objective import Columns, Piece, Pieces
from foveate.train.store import TokenStore


class CausalLM:
    """Rows: {"text"}; {"prompt", "completion"}; or {"messages": [{"role", "content"}, ...]}, rendered by the chat template.

    The end token follows each text and completion. Texts longer than max_length are cut into pieces that share one token, so that
    every token but the first is predicted once; chats and prompts are never cut.
    """

    perplexity = True
    head: str | None = None

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length

    def signature(self) -> dict[str, Any]:
        return {"text_field": self.config.text_field}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """tokens int32; target uint8, 1 where the token is to be predicted; whole uint8 [1], 1 if the row may not be cut."""
        texts: list[str] = []
        spans: list[list[tuple[int, int]] | None] = []  # of the characters to be predicted; None: all
        ends: list[bool] = []
        for row in rows:
            text, span, end = chat.text_of(row, self.config.text_field, self.tokenizer)
            texts.append(text)
            spans.append(span)
            ends.append(end)
        end_id = min(self.tokenizer.eos_ids, default=None)
        columns: Columns = {"tokens": [], "target": [], "whole": []}
        rendered = [chat.is_rendered(row) for row in rows]
        # a rendered template has its special tokens in the text
        for special in (True, False):
            picked = [i for i in range(len(rows)) if rendered[i] != special]
            encodings = self.tokenizer.backend.encode_batch([texts[i] for i in picked], add_special_tokens=special)
            for i, encoding in zip(picked, encodings):
                tokens = list(encoding.ids)
                target = chat.target_flags(encoding.offsets, spans[i])
                if ends[i] and end_id is not None and tokens[-1:] != [end_id]:
                    tokens.append(end_id)
                    target.append(1)
                columns["tokens"].append(np.array(tokens, np.int32))
                columns["target"].append(np.array(target, np.uint8))
                columns["whole"].append(np.array([spans[i] is not None], np.uint8))
        return columns

    def pieces(self, store: TokenStore) -> Pieces:
        inputs = store.lengths("tokens") - 1 if len(store) else np.empty(0, np.int64)
        whole = store.values("whole").astype(bool) if len(store) else np.empty(0, bool)
        too_long = whole & (inputs > self.max_length)
        if too_long.any() and self.config.too_long == "error":
            raise ValueError(
                f"{int(too_long.sum())} of {len(store)} chats or prompts are longer than max_length={self.max_length} tokens, the "
                f"longest has {int(inputs[too_long].max())}; raise max_length, or leave them out with too_long='drop'"
            )
        found = cut(np.where(too_long, 0, np.maximum(inputs, 0)), self.max_length)
        if len(found.lengths) and not any(store.get("target", d)[1:].any() for d in range(len(store))):
            raise ValueError(
                "all labels are ignored: no row has a token to be predicted; do the chats have replies, the prompts completions?"
            )
        return found

    def collate(self, store: TokenStore, pieces: Sequence[Piece]) -> Batch:
        inputs, labels = [], []
        for piece in pieces:
            end = piece.start + piece.length + 1
            tokens = store.get("tokens", piece.document)[piece.start : end]
            target = store.get("target", piece.document)[piece.start + 1 : end]
            inputs.append(tokens[:-1])
            labels.append(np.where(target, tokens[1:], IGNORED))
        lengths = [len(x) for x in inputs]
        packed, _ = layout(lengths, self.config.packing)
        tensors = {"tokens": join(inputs, self.config.packing), "labels": join(labels, self.config.packing, IGNORED)}
        return Batch(tensors, packed, int((tensors["labels"] != IGNORED).sum()), sum(lengths))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        # padding on the right needs no mask: no token sees what comes after it
        hidden = model.hidden(batch["tokens"], packed=batch.packed.get("tokens"))
        return head_loss(
            model.lm_head, hidden, batch["labels"], self.config, softcap=getattr(model.config, "final_softcap", None)
        )

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.loss(model, batch)}

    def task_metrics(self, model: nn.Module) -> dict[str, float]:
        return {}


def cut(lengths: np.ndarray, longest: int) -> Pieces:
    """Documents of `lengths` tokens in pieces of up to `longest`; none of those without tokens."""
    count = -(-lengths // longest)
    documents = np.repeat(np.arange(len(lengths)), count)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(count) - count, count)) * longest
    return Pieces(documents, starts, np.minimum(lengths[documents] - starts, longest))


def head_loss(head: Any, hidden: Tensor, labels: Tensor, config: TrainConfig, **options: Any) -> Tensor:
    """The summed cross-entropy of head(hidden); the logits are never stored. Evaluation measures it without smoothing and z-loss."""
    if torch.is_grad_enabled():
        options |= {"label_smoothing": config.label_smoothing, "z_loss": config.z_loss}
    return linear_cross_entropy(hidden, head.weight, labels, bias=head.bias, reduction="sum", **options)
