"""Extractive question answering: where in a text the answer begins and ends (Devlin et al. 2018, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.files.data_files import read_rows
from foveate.ops.cross_entropy import cross_entropy
from foveate.pipelines.question_answering import QuestionAnswerer
from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data.batch import Batch, join, layout
from foveate.train.data.examples import Columns, Example, Examples, text_of
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Objective
from foveate.train.objectives.squad_metric import scores

MAX_ANSWER_LEN = 30  # tokens of an answer in evaluation


class QuestionAnswering(Objective):
    """Rows as in SQuAD: {"question", "context", "answers": [{"text", "answer_start"}]}; the first answer is learnt.

    A context that does not fit beside its question is read in windows that share doc_stride tokens. In a window without the whole
    answer, and where there is no answer, the target is [CLS]. Evaluated by exact match and F1 of whole answers on eval_data.
    """

    head = "question-answering"

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        frame = tokenizer.backend.encode("", "").ids
        if len(frame) != 3 or frame[1] != frame[2]:
            raise ValueError(
                f"the tokenizer frames a pair of texts with the ids {frame}; needed is [CLS] question [SEP] context [SEP]"
            )
        self._cls, self._sep = frame[:2]

    def signature(self) -> dict[str, Any]:
        c = self.config
        return {"max_length": self.max_length, "doc_stride": c.doc_stride, "too_long": c.too_long}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """For each window: tokens int32; places int32 [3]: where the context begins, and the answer's first and last token. A row that
        is left out has one without tokens."""
        for row in rows:
            for name in ("question", "context"):
                text_of(row, name, "; rows are as in SQuAD")
        contexts = {row["context"]: i for i, row in enumerate(rows)}
        found = self.tokenizer.backend.encode_batch(list(contexts), add_special_tokens=False)
        encodings = dict(zip(contexts, found))
        questions = self.tokenizer.backend.encode_batch([row["question"] for row in rows], add_special_tokens=False)
        columns: Columns = {"tokens": [], "places": []}
        for row, question in zip(rows, questions):
            self._add_windows(columns, question.ids, encodings[row["context"]], _first_answer(row))
        return columns

    def _add_windows(self, columns: Columns, question: list[int], context: Any, answer: tuple[int, int] | None) -> None:
        room = self.max_length - len(question) - 3
        if room <= self.config.doc_stride and len(context.ids) > room:
            if self.config.too_long == "drop":
                columns["tokens"].append(np.empty(0, np.int32))
                columns["places"].append(np.zeros(3, np.int32))
                return
            raise ValueError(
                f"a question of {len(question)} tokens leaves {room} of max_length={self.max_length} for its context, and windows share "
                f"doc_stride={self.config.doc_stride}; raise max_length, lower doc_stride, or leave such rows out with too_long='drop'"
            )
        span = None if answer is None else _tokens_of(context.offsets, *answer)
        begin = len(question) + 2
        start = 0
        while True:
            part = context.ids[start : start + room]
            first, last = (0, 0) if span is None else (span[0] - start, span[1] - start)
            inside = span is not None and first >= 0 and last < len(part)
            columns["tokens"].append(np.array([self._cls, *question, self._sep, *part, self._sep], np.int32))
            columns["places"].append(
                np.array([begin, begin + first, begin + last] if inside else [begin, 0, 0], np.int32)
            )
            if start + room >= len(context.ids):
                return
            start += room - self.config.doc_stride

    def examples(self, store: TokenStore) -> Examples:
        lengths = store.lengths("tokens") if len(store) else np.empty(0, np.int64)
        documents = np.flatnonzero(lengths)
        return Examples(documents, np.zeros_like(documents), lengths[documents])

    def notes(self, store: TokenStore) -> list[str]:
        left_out = int((store.lengths("tokens") == 0).sum()) if len(store) else 0
        return (
            [f"{left_out} questions leave too little of max_length for their contexts and are left out"]
            if left_out
            else []
        )

    def collate(self, store: TokenStore, examples: Sequence[Example]) -> Batch:
        tokens = [store.get("tokens", example.document) for example in examples]
        places = [store.get("places", example.document) for example in examples]
        types = [(np.arange(len(t)) >= p[0]).astype(np.int64) for t, p in zip(tokens, places)]
        packing = self.config.packing
        packed, lens = layout([len(t) for t in tokens], packing)
        targets = torch.from_numpy(np.stack(places)[:, 1:].astype(np.int64))
        tensors = {"tokens": join(tokens, packing), "types": join(types, packing), "targets": targets, **lens}
        return Batch(tensors, packed, len(examples), sum(map(len, tokens)))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Half the sum of the losses of start and end."""
        logits = model(batch["tokens"], batch["types"], **batch.padding())
        options: dict[str, Any] = {}
        if torch.is_grad_enabled():
            options = {"label_smoothing": self.config.label_smoothing, "z_loss": self.config.z_loss}
        losses = [
            cross_entropy(by_sequence(x, batch), target, reduction="sum", **options)
            for x, target in zip(logits, batch["targets"].unbind(1))
        ]
        return (losses[0] + losses[1]) / 2

    def task_metrics(self, model: torch.nn.Module) -> dict[str, float]:
        rows = list(read_rows(self.config.eval_data))
        if not rows:
            return {}
        answerer = QuestionAnswerer(model, self.tokenizer)
        truths = [[answer["text"] for answer in _answers(row)] for row in rows]
        found: Any = answerer(
            [row["question"] for row in rows], [row["context"] for row in rows], max_seq_len=self.max_length,
            doc_stride=min(self.config.doc_stride, self.max_length // 2), max_answer_len=MAX_ANSWER_LEN, batch_size=16,
            max_question_len=self.max_length, handle_impossible_answer=not all(truths),  # as in SQuAD 2
        )  # fmt: skip
        return scores([best["answer"] for best in found], truths)


def by_sequence(logits: Tensor, batch: Batch) -> Tensor:
    """Logits of each token, packed [1, total] or padded [B, S], as [sequences, longest] with the lowest number where no token is."""
    low = torch.finfo(logits.dtype).min
    packed = batch.packed.get("tokens")
    if packed is None:
        places = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill(places >= batch["tokens_lens"][:, None], low)
    lengths = packed.cu_seqlens.diff().long()
    rows = torch.arange(len(lengths), device=logits.device).repeat_interleave(lengths)
    out = logits.new_full((len(lengths), packed.longest), low)
    return out.index_put((rows, packed.positions), logits[0])[:-1]  # not of the filling


def _answers(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Also where they are {"text": [...], "answer_start": [...]}, as the datasets library has them."""
    try:
        answers = row["answers"]
        if isinstance(answers, dict):
            answers = [
                {"text": text, "answer_start": start} for text, start in zip(answers["text"], answers["answer_start"])
            ]
        return [{"text": str(a["text"]), "answer_start": int(a["answer_start"])} for a in answers]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'"answers" must be a list of {{"text", "answer_start"}}, empty if there is none, and is {row.get("answers")!r}'
        ) from error


def _first_answer(row: dict[str, Any]) -> tuple[int, int] | None:
    """Its characters."""
    answers = _answers(row)
    if not answers:
        return None
    text, start = answers[0]["text"], answers[0]["answer_start"]
    if row["context"][start : start + len(text)] != text:
        raise ValueError(
            f"the answer {text[:40]!r} is not at its answer_start {start} of the context {row['context'][:40]!r}...; correct the data"
        )
    return start, start + len(text)


def _tokens_of(offsets: Sequence[tuple[int, int]], start: int, end: int) -> tuple[int, int] | None:
    """First and last token that have a character in [start, end); None where there is none."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    return (inside[0], inside[-1]) if inside else None
