"""QuestionAnswerer: extractive question answering with BERT, as transformers' pipeline("question-answering") did it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from foveate.pipelines.encoder import load_encoder
from foveate.tokenizer import Tokenizer


class _Window(NamedTuple):
    """[CLS] question [SEP] part of the context [SEP], with as many separators as the tokenizer has."""

    example: int
    ids: list[int]
    context_start: int  # where the context begins in ids
    first: int  # the context's token that stands there
    length: int  # how many of the context's tokens


class _Example(NamedTuple):
    context: str
    offsets: list[tuple[int, int]]  # the characters of each token of the context
    words: list[tuple[int, int]]  # the characters of each token's word


class BestWindow(NamedTuple):
    """The window of a text that the best answer is in, as the model reads it. start, end: the answer's first and last token there."""

    ids: list[int]
    types: list[int]
    start: int
    end: int
    answer: dict[str, Any]


class QuestionAnswerer:
    """Finds the part of a text that answers a question (Devlin et al. 2018, arXiv 1810.04805, section 4.2).

        answerer = QuestionAnswerer("path to a BERT fine-tuned on SQuAD")
        answerer(question="Who wrote it?", context="It was written by Ada.")
        # {"score": 0.98, "start": 18, "end": 21, "answer": "Ada"}

    path_or_model: what `load_model` takes, an encoder or a BART, or a BertForQuestionAnswering together with its tokenizer.
    """

    def __init__(
        self,
        path_or_model: str | Path | nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantization: str | None = None,
        progress: bool | None = None,
    ) -> None:
        found = load_encoder(
            path_or_model, tokenizer, task="question answering", head="question-answering", device=device, dtype=dtype,
            quantization=quantization, progress=progress,
        )  # fmt: skip
        self.model, self.tokenizer = found.model, found.tokenizer
        self._frame = _pair_frame(self.tokenizer)

    def __call__(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        *,
        top_k: int = 1,
        doc_stride: int | None = None,
        max_answer_len: int = 15,
        max_seq_len: int | None = None,
        max_question_len: int = 64,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
        batch_size: int = 8,
    ) -> dict[str, Any] | list[Any]:
        """{"score", "start", "end", "answer"} with context[start:end] == answer; with top_k > 1 a list of up to top_k, best first.

        question and context: texts, or lists of one length, or a list of questions about one context; lists give a list.

        A context that is too long is read in windows of max_seq_len tokens (384 if None, or what the model has if that is less),
        question included, two neighbours sharing doc_stride tokens of the context (128 if None, or half of max_seq_len if that is
        less). An answer has up to max_answer_len tokens. Its score is P(start) * P(end), softmaxes over the window's context and
        [CLS]; the scores of equal texts, found in several places or windows, are added up. handle_impossible_answer lets the answer
        "" compete, with P([CLS])**2 of the window that is least in favour of it. align_to_words widens answers to whole words.
        batch_size: windows in one forward pass.

        ValueError for empty texts, a question longer than max_question_len tokens, and sizes that leave no room for the context.
        """
        questions, contexts, single = _pair_up(question, context)
        positions = self.model.config.max_positions
        max_seq_len = min(384, positions) if max_seq_len is None else max_seq_len
        doc_stride = min(128, max_seq_len // 2) if doc_stride is None else doc_stride
        numbers = {
            "top_k": top_k,
            "max_answer_len": max_answer_len,
            "max_seq_len": max_seq_len,
            "batch_size": batch_size,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        if max_seq_len > positions:
            raise ValueError(f"max_seq_len={max_seq_len} is more than the model's {positions} positions")
        if doc_stride < 0:
            raise ValueError(f"doc_stride={doc_stride} must not be negative")
        examples, windows = self._windows(questions, contexts, max_seq_len, doc_stride, max_question_len)
        # More than asked for, because several may widen to the same words.
        wanted = 2 * top_k + 10 if align_to_words else top_k
        answers: list[list[dict[str, Any]]] = [[] for _ in examples]
        null_scores = [float("inf")] * len(examples)
        for at in range(0, len(windows), batch_size):
            batch = windows[at : at + batch_size]
            for window, start, end in zip(batch, *self._logits(batch)):
                spans, null_score = _spans(window, start, end, wanted, max_answer_len)
                null_scores[window.example] = min(null_scores[window.example], null_score)
                for first, last, score in spans:
                    _add(answers[window.example], examples[window.example], first, last, score, align_to_words)
        for found, null_score in zip(answers, null_scores):
            if handle_impossible_answer:
                found.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
            found.sort(key=lambda answer: -answer["score"])
        results: list[Any] = [found[0] if top_k == 1 else found[:top_k] for found in answers]
        return results[0] if single else results

    def best_window(self, question: str, context: str) -> BestWindow:
        """Where the best single span of the context is, in windows of the default sizes of a call."""
        questions, contexts, _ = _pair_up(question, context)
        max_seq_len = min(384, self.model.config.max_positions)
        examples, windows = self._windows(questions, contexts, max_seq_len, min(128, max_seq_len // 2), 64)
        found = []
        for window in windows:
            [start], [end] = self._logits([window])
            spans, _ = _spans(window, start, end, 1, 15)
            found += [(score, window, first, last) for first, last, score in spans]
        score, window, first, last = max(found, key=lambda one: one[0])
        answers: list[dict[str, Any]] = []
        _add(answers, examples[0], first, last, score, True)
        types = [0] * window.context_start + [1] * (len(window.ids) - window.context_start)
        place = window.context_start - window.first
        return BestWindow(window.ids, types, place + first, place + last, answers[0])

    def _windows(
        self, questions: list[str], contexts: list[str], max_seq_len: int, doc_stride: int, max_question_len: int
    ) -> tuple[list[_Example], list[_Window]]:
        examples, windows = [], []
        read: dict[str, tuple[list[int], _Example]] = {}
        for i, (question, context) in enumerate(zip(questions, contexts)):
            ids = self.tokenizer.encode(question, add_special_tokens=False)
            if len(ids) > max_question_len:
                raise ValueError(
                    f"the question {question[:40]!r}... has {len(ids)} tokens, more than max_question_len={max_question_len}"
                )
            if context not in read:
                read[context] = self._read(context)
            context_ids, example = read[context]
            before, between, after = self._frame
            room = max_seq_len - len(ids) - len(before) - len(between) - len(after)
            if room <= doc_stride and len(context_ids) > room:
                raise ValueError(
                    f"max_seq_len={max_seq_len} leaves {room} tokens for the context beside a question of {len(ids)}; windows that "
                    f"share doc_stride={doc_stride} tokens need more: raise max_seq_len or lower doc_stride"
                )
            examples.append(example)
            start = 0
            while True:
                part = context_ids[start : start + room]
                head = [*before, *ids, *between]
                windows.append(_Window(i, [*head, *part, *after], len(head), start, len(part)))
                if start + room >= len(context_ids):
                    break
                start += room - doc_stride
        return examples, windows

    def _read(self, context: str) -> tuple[list[int], _Example]:
        encoding = self.tokenizer.backend.encode(context, add_special_tokens=False)
        if not encoding.ids:
            raise ValueError("a context has no tokens, only white space; there is nothing to answer from")
        span: dict[Any, tuple[int, int]] = {}  # of each word
        for token, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets)):
            key = ("token", token) if word is None else word
            before = span.get(key, (start, end))
            span[key] = (min(before[0], start), max(before[1], end))
        words = [span[("token", i) if word is None else word] for i, word in enumerate(encoding.word_ids)]
        return encoding.ids, _Example(context, encoding.offsets, words)

    @torch.inference_mode()
    def _logits(self, windows: list[_Window]) -> tuple[Tensor, Tensor]:
        """fp32 [windows, longest] on the CPU, of starts and ends."""
        device = next(self.model.parameters()).device
        longest = max(len(window.ids) for window in windows)
        tokens, types = torch.zeros(2, len(windows), longest, dtype=torch.long)
        for row, window in enumerate(windows):
            tokens[row, : len(window.ids)] = torch.tensor(window.ids)
            types[row, window.context_start : len(window.ids)] = 1
        lengths = torch.tensor([len(window.ids) for window in windows], dtype=torch.int32)
        start, end = self.model(tokens.to(device), types.to(device), kv_lens=lengths.to(device))
        return start.float().cpu(), end.float().cpu()


def _pair_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int], list[int]]:
    """The ids before, between and after a pair of texts: BERT has one separator between them, RoBERTa and BART have two."""
    pair = tokenizer.backend.encode("a", "a")
    texts = getattr(pair, "sequence_ids", [])
    if 0 not in texts or 1 not in texts or texts[0] is not None or texts[texts.index(1) - 1] is not None:
        frame = [i for i, text in zip(pair.ids, texts) if text is None]
        raise ValueError(
            f"the tokenizer frames a pair of texts with the ids {frame}; needed is [CLS] question [SEP] context [SEP]"
        )
    first, second = texts.index(0), texts.index(1)
    between = first + texts.count(0)
    return pair.ids[:first], pair.ids[between:second], pair.ids[second + texts.count(1) :]


def _pair_up(question: str | Sequence[str], context: str | Sequence[str]) -> tuple[list[str], list[str], bool]:
    single = isinstance(question, str) and isinstance(context, str)
    questions = [question] if isinstance(question, str) else list(question)
    contexts = [context] * len(questions) if isinstance(context, str) else list(context)
    if len(questions) != len(contexts):
        raise ValueError(f"there are {len(questions)} questions and {len(contexts)} contexts; give as many of both")
    for name, texts in (("question", questions), ("context", contexts)):
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"a {name} must be a str, got {type(text).__name__}")
            if not text.strip():
                raise ValueError(f"a {name} is empty")
    return questions, contexts, single


def _spans(
    window: _Window, start: Tensor, end: Tensor, wanted: int, max_answer_len: int
) -> tuple[list[tuple[int, int, float]], float]:
    """The best (first token, last token of the context, score) of a window, and the score of no answer."""
    context = slice(window.context_start, window.context_start + window.length)
    # the softmaxes run over [CLS] and the context
    p_start, p_end = (torch.cat([x[:1], x[context]]).softmax(0) for x in (start, end))
    null_score = float(p_start[0] * p_end[0])
    # [first token, answer's length - 1]
    ends = torch.nn.functional.pad(p_end[1:], (0, max_answer_len - 1), value=-1.0).unfold(0, max_answer_len, 1)
    scores = p_start[1:, None] * ends
    scores[ends < 0] = -1.0
    best = scores.flatten().topk(min(wanted, scores.numel()))
    spans = []
    for score, place in zip(best.values.tolist(), best.indices.tolist()):
        first, more = divmod(place, max_answer_len)
        if score >= 0:
            spans.append((window.first + first, window.first + first + more, score))
    return spans, null_score


def _add(
    answers: list[dict[str, Any]], example: _Example, first: int, last: int, score: float, align_to_words: bool
) -> None:
    characters = example.words if align_to_words else example.offsets
    start, end = characters[first][0], characters[last][1]
    text = example.context[start:end]
    for answer in answers:
        if answer["answer"].lower() == text.lower():
            answer["score"] += score
            return
    answers.append({"score": score, "start": start, "end": end, "answer": text})
