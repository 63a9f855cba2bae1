"""Data that are held out: their share of the tokens, each class, whole rows; and what is best by them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foveate.train import loop as loops
from foveate.train.data.examples import Examples, Parts
from foveate.train.data.hold_out import hold_out
from objective_toys import BERT, wordpiece
from train_toys import run, sentences, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


def documents(lengths: list[int], longest: int = 64) -> Examples:
    """Cut into examples of `longest`."""
    found = [(d, start, min(longest, n - start)) for d, n in enumerate(lengths) for start in range(0, n, longest)]
    return Examples(*(np.array(column, np.int64) for column in zip(*found)))


def parts(count: int, **changes) -> Parts:
    default = Parts(np.arange(count), np.zeros(count, np.int64), np.zeros(count, bool))
    return default._replace(**changes)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5])
def test_the_share_is_of_tokens_and_of_each_class(share):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 64, 1000).tolist()
    classes = np.sort(rng.choice(3, 1000, p=[0.8, 0.15, 0.05]))  # as sorted files have them
    examples = documents(lengths)
    out = hold_out(examples, parts(1000, classes=classes), share, seed=3)
    assert examples.lengths[out].sum() == pytest.approx(share * examples.lengths.sum(), rel=0.02)
    for each in range(3):
        mine = classes[examples.documents] == each
        assert examples.lengths[out & mine].sum() == pytest.approx(share * examples.lengths[mine].sum(), abs=80)
        assert (mine & ~out).any()
    assert np.array_equal(out, hold_out(examples, parts(1000, classes=classes), share, seed=3))
    assert not np.array_equal(out, hold_out(examples, parts(1000, classes=classes), share, seed=4))
    assert out[:-5].any()  # not the last ones only


def test_groups_stay_together():
    groups = np.repeat(np.arange(40), 5)
    examples = documents([10] * 200)
    out = hold_out(examples, parts(200, groups=groups), 0.2, seed=0)
    for each in range(40):
        assert len(set(out[groups == each].tolist())) == 1
    assert out.sum() == 40


@pytest.mark.parametrize(
    "lengths", [[30_000], [65_536, 500], [65_000, 65_000, 200], [65_536, 34_000], [100, 100, 100_000]]
)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.4])
def test_few_long_texts_are_divided(lengths, share):
    examples = documents(lengths)
    out = hold_out(examples, parts(len(lengths), divisible=np.ones(len(lengths), bool)), share, seed=1)
    assert examples.lengths[out].sum() == pytest.approx(share * sum(lengths), rel=0.25)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_can_be_held_out_of_one_row(count):
    examples = documents([10] * count) if count else Examples(*(np.empty(0, np.int64) for _ in range(3)))
    with pytest.raises(ValueError, match=r"eval_fraction=0.5 of the data.* give eval_data, or more rows"):
        hold_out(examples, parts(count), 0.5, seed=0)


def test_a_class_of_one_row_is_learnt():
    examples = documents([10] * 5)
    for seed in range(5):
        out = hold_out(examples, parts(5, classes=np.array([0, 0, 0, 0, 1])), 0.4, seed)
        assert not out[4] and out.sum() == 2


def test_sorted_classes_are_all_seen_and_it_is_said(tmp_path, capfd):
    rows = [{"text": text, "label": "ab"[i >= 40]} for i, text in enumerate(sentences(50))]
    result = run(
        tmp_path, objective="sequence-classification", new_model=BERT, tokenizer=wordpiece(tmp_path), max_steps=1, eval_fraction=0.2,
        train_data=[write_jsonl(tmp_path / "a.jsonl", rows)], progress=None,
    )  # fmt: skip
    assert (
        "the same share of each label" in capfd.readouterr().err and {"loss", "accuracy", "f1"} <= result.metrics.keys()
    )


def test_which_data_are_empty_is_said(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="eval_data: .*empty"):
        run(tmp_path, eval_data=[str(tmp_path / "empty.jsonl")])


def evaluations(monkeypatch, values: list[dict[str, float]]) -> None:
    left = iter(values)
    monkeypatch.setattr(loops.Loop, "evaluate", lambda self, data: next(left))


def test_an_evaluation_that_is_no_number_is_never_the_best(tmp_path, monkeypatch, capfd):
    evaluations(monkeypatch, [{"loss": x} for x in (2.0, 1.0, math.nan, 3.0, 2.9, math.inf)])
    result = run(tmp_path, eval_fraction=0.2, eval_every=1, max_steps=6, progress=None)
    assert result.best.name == "step-00000002" and result.best_loss == 1.0
    assert "the evaluation's loss is nan" in capfd.readouterr().err
    lines = (tmp_path / "out" / "metrics.jsonl").read_text() + (result.last / "state" / "state.json").read_text()
    assert "NaN" not in lines and "Infinity" not in lines
    evaluations(monkeypatch, [{"loss": 0.5}])
    again = run(tmp_path, eval_fraction=0.2, eval_every=1, max_steps=7, resume=True)
    assert (
        again.best.name == "step-00000007"
        and [math.isnan(r["eval_loss"]) for r in again.history if "eval_loss" in r][2]
    )


@pytest.mark.parametrize("best_by, best", [("loss", 2), ("accuracy", 3)])
def test_best_and_patience_by_any_metric(tmp_path, monkeypatch, best_by, best):
    measured = [(3.0, 0.5), (1.0, 0.4), (2.0, 0.9), (2.5, 0.1), (2.6, 0.1), (2.7, 0.1)]
    evaluations(monkeypatch, [{"loss": a, "accuracy": b} for a, b in measured])
    result = run(
        tmp_path, objective="masked-lm", new_model=BERT, tokenizer=wordpiece(tmp_path), eval_fraction=0.2, eval_every=1, max_steps=6,
        best_by=best_by, patience=2,
    )  # fmt: skip
    assert result.best.name == f"step-{best:08d}" and result.steps == best + 2
    assert result.best_metrics == {"loss": measured[best - 1][0], "accuracy": measured[best - 1][1]}


def test_best_by_what_is_not_measured(tmp_path):
    with pytest.raises(
        ValueError, match="best_by='accuracy' is not measured by causal-lm; choose one of loss, perplexity"
    ):
        run(tmp_path, eval_fraction=0.2, best_by="accuracy")
    with pytest.raises(ValueError, match="best_by needs something to evaluate on"):
        run(tmp_path, best_by="perplexity", train_data=[texts(tmp_path)])
