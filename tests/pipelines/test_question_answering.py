"""QuestionAnswerer against a brute-force oracle on the tokenizers library's own windows, with a random BERT and a tiny tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from foveate.models import bert
from foveate.pipelines.question_answering import QuestionAnswerer
from model_cases import randomize
from pipeline_toys import question_tokenizer as make_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = (
    "The Cat sat on the mat,  and then ran. Café 42!\nThe catalogue sat;\tthen the MAT ran on and on, 中中 the mat sat. "
    "Xylophones ran then. A cat? The end of the cat on the mat and the hat sat on then."
)
QUESTIONS = ["Who sat on the mat?", "What ran?"]


@pytest.fixture
def answerer() -> QuestionAnswerer:
    tokenizer = make_tokenizer()
    config = bert.BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        max_positions=128,
    )
    model = bert.BertForQuestionAnswering(config)
    randomize(model, 0.5)
    return QuestionAnswerer(model.eval(), tokenizer)


def oracle(
    answerer: QuestionAnswerer, question: str, context: str, *, max_seq_len: int, doc_stride: int, max_answer_len: int = 15,
    align_to_words: bool = True, pre_topk: int = 10**9, handle_impossible_answer: bool = False,
) -> tuple[list[dict[str, Any]], int]:  # fmt: skip
    """All answers, best first, and the number of windows: every span of every window, one window at a time."""
    backend = tokenizers.Tokenizer.from_str(answerer.tokenizer.backend.to_str())
    words = backend.encode(context, add_special_tokens=False)
    backend.enable_truncation(max_seq_len, stride=doc_stride, strategy="only_second")
    encoding = backend.encode(question, context)
    windows = [encoding, *encoding.overflowing]
    answers: dict[str, dict[str, Any]] = {}
    null_score = 1e6
    for window in windows:
        inside = [i for i, sequence in enumerate(window.sequence_ids) if sequence == 1]
        with torch.no_grad():
            start, end = answerer.model(torch.tensor([window.ids]), torch.tensor([window.type_ids]))
        start, end = (torch.exp(x[0].double()) for x in (start, end))
        start_total, end_total = (float(x[0] + x[inside].sum()) for x in (start, end))
        null_score = min(null_score, float(start[0] * end[0]) / start_total / end_total)
        spans = []
        for s in inside:
            for e in inside:
                if s <= e < s + max_answer_len:
                    spans.append((float(start[s] * end[e]) / start_total / end_total, s, e))
        for score, s, e in sorted(spans, reverse=True)[:pre_topk]:
            first, last = window.offsets[s][0], window.offsets[e][1]
            if align_to_words:
                # whole words also where the window cuts one
                first = words.word_to_chars(window.token_to_word(s))[0]
                last = words.word_to_chars(window.token_to_word(e))[1]
            text = context[first:last]
            if text.lower() in answers:
                answers[text.lower()]["score"] += score
            else:
                answers[text.lower()] = {"score": score, "start": first, "end": last, "answer": text}
    found = list(answers.values())
    if handle_impossible_answer:
        found.append({"score": null_score, "start": 0, "end": 0, "answer": ""})
    return sorted(found, key=lambda a: -a["score"]), len(windows)


def assert_same(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert (a["start"], a["end"], a["answer"]) == (b["start"], b["end"], b["answer"])
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("max_seq_len, doc_stride, windows", [(128, 40, 1), (48, 12, 4), (40, 0, 3), (33, 20, 24)])
def test_answers_of_the_oracle(
    answerer: QuestionAnswerer, align: bool, max_seq_len: int, doc_stride: int, windows: int
) -> None:
    question, top_k = QUESTIONS[0], 5
    sizes = {"max_seq_len": max_seq_len, "doc_stride": doc_stride}
    pre_topk = 2 * top_k + 10 if align else top_k
    expected, count = oracle(answerer, question, CONTEXT, align_to_words=align, pre_topk=pre_topk, **sizes)
    assert (count == 1) == (windows == 1)
    got = answerer(question, CONTEXT, top_k=top_k, align_to_words=align, batch_size=3, **sizes)
    assert isinstance(got, list)
    assert_same(got, expected[:top_k])
    for answer in got:
        assert CONTEXT[answer["start"] : answer["end"]] == answer["answer"] != ""


def test_lists_and_batches_and_single_calls_agree(answerer: QuestionAnswerer) -> None:
    contexts = [CONTEXT, CONTEXT[40:90]]
    sizes = {"max_seq_len": 50, "doc_stride": 10}
    both = answerer(question=QUESTIONS, context=contexts, **sizes)
    assert isinstance(both, list)
    for size in (1, 2, 100):
        again = answerer(question=QUESTIONS, context=contexts, batch_size=size, **sizes)
        assert_same(again, both)  # type: ignore[arg-type]
    one = [answerer(question=q, context=c, **sizes) for q, c in zip(QUESTIONS, contexts)]
    assert_same(one, both)  # type: ignore[arg-type]
    about_one = answerer(question=QUESTIONS, context=CONTEXT, **sizes)
    assert_same(about_one[:1], both[:1])  # type: ignore[index]
    assert set(one[0]) == {"score", "start", "end", "answer"}
    assert answerer([], []) == []


def test_max_answer_len_counts_tokens(answerer: QuestionAnswerer) -> None:
    for length in (1, 3):
        got = answerer(QUESTIONS[0], CONTEXT, top_k=20, max_answer_len=length, align_to_words=False)
        pieces = [len(answerer.tokenizer.encode(a["answer"], add_special_tokens=False)) for a in got]  # type: ignore[index, call-overload]
        assert max(pieces) == length or length == 1
        expected, _ = oracle(
            answerer, QUESTIONS[0], CONTEXT, max_seq_len=128, doc_stride=64, max_answer_len=length, align_to_words=False,
            pre_topk=20,
        )  # fmt: skip
        assert_same(got, expected[:20])  # type: ignore[arg-type]


class Inclined(torch.nn.Module):
    """Adds `more` to the logits of [CLS]."""

    def __init__(self, model: Any, more: float) -> None:
        super().__init__()
        self.model, self.more, self.config = model, more, model.config

    def forward(self, *args: Any, **options: Any) -> Any:
        start, end = self.model(*args, **options)
        first = torch.arange(start.shape[1]) == 0
        return start + self.more * first, end + self.more * first


@pytest.mark.parametrize("more, place", [(-9.0, "last"), (2.0, "between"), (9.0, "first")])
def test_no_answer_competes_with_its_least_score(answerer: QuestionAnswerer, more: float, place: str) -> None:
    sizes = {"max_seq_len": 48, "doc_stride": 12}
    inclined = QuestionAnswerer(Inclined(answerer.model, more), answerer.tokenizer)
    expected, _ = oracle(inclined, QUESTIONS[0], CONTEXT, handle_impossible_answer=True, **sizes)
    got = inclined(QUESTIONS[0], CONTEXT, top_k=5000, handle_impossible_answer=True, **sizes)
    assert_same(got[:50], expected[:50])  # type: ignore[arg-type, index]
    null = [i for i, a in enumerate(got) if a["answer"] == ""]  # type: ignore[call-overload, index]
    assert len(null) == 1
    assert {0: "first", len(got) - 1: "last"}.get(null[0], "between") == place
    assert got[null[0]]["score"] == pytest.approx(next(a["score"] for a in expected if not a["answer"]), rel=1e-4)  # type: ignore[index]
    best = inclined(QUESTIONS[0], CONTEXT, handle_impossible_answer=True, **sizes)
    if place != "between":  # with fewer spans looked at, fewer are added up
        assert (best["answer"] == "") == (place == "first")  # type: ignore[call-overload, index]
    assert inclined(QUESTIONS[0], CONTEXT, **sizes)["answer"] != ""  # type: ignore[call-overload, index]


def test_loads_from_a_folder_and_names_what_is_missing(answerer: QuestionAnswerer, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = {
        "model_type": "bert", "vocab_size": answerer.tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(answerer.model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no tokenizer.json; pass tokenizer="):
        QuestionAnswerer(tmp_path)
    answerer.tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    loaded = QuestionAnswerer(tmp_path)
    assert loaded(QUESTIONS[0], CONTEXT) == answerer(QUESTIONS[0], CONTEXT)
    bare = {name: w for name, w in answerer.model.state_dict().items() if not name.startswith("qa_outputs")}
    save_file(bare, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks qa_outputs.bias, qa_outputs.weight, .* new_head=True"):
        QuestionAnswerer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    with pytest.raises(ValueError, match="is of architecture 't5'; question answering needs 'bert'"):
        QuestionAnswerer(tmp_path)


def test_wrong_calls_are_said(answerer: QuestionAnswerer) -> None:
    ask = QUESTIONS[0]
    for call, message in (
        (lambda: answerer("", CONTEXT), "a question is empty"),
        (lambda: answerer(ask, " \n"), "a context is empty"),
        (lambda: answerer(ask, "\u200b\u0001"), "a context has no tokens"),
        (lambda: answerer([ask], ["a", "b"]), "there are 1 questions and 2 contexts"),
        (lambda: answerer(ask, CONTEXT, top_k=0), "top_k=0 must be 1 or more"),
        (lambda: answerer(ask, CONTEXT, max_seq_len=129), "max_seq_len=129 is more than the model's 128 positions"),
        (lambda: answerer("mat " * 65, CONTEXT), "has 65 tokens, more than max_question_len=64"),
        (
            lambda: answerer(ask, CONTEXT, max_seq_len=20, doc_stride=15),
            "max_seq_len=20 leaves 9 tokens for the context",
        ),
        (lambda: answerer(ask, CONTEXT, doc_stride=-1), "doc_stride=-1 must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="a context must be a str, got int"):
        answerer([ask], [3])  # type: ignore[list-item]
