"""Tasks on files: figures by hand, sentences for what is wrong, comparisons and their exit status."""

from __future__ import annotations

import json
import math

import pytest

import foveate
import generation_toys as toys
from foveate.cli import main
from foveate.evaluate import compare, evaluate
from foveate.evaluate.sandbox import Limits, run_python
from foveate.evaluate.tasks import f1, normalised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.folder(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def llm(folder):
    return foveate.LLM(folder, num_pages=256, page_size=4, progress=False)


def write(file, rows):
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return file


CHOICES = [
    {"question": "the quick brown", "choices": ["fox", "dog, again and again", "the"], "answer": 0},
    {"question": "over the lazy", "choices": ["dog", "fox"], "answer": "B"},
    {"question": "jumps", "choices": ["over", "count"], "answer": "over"},
]


def logprob(llm, text, start):
    ids = llm.encode(text)
    [output] = llm.generate([ids], foveate.SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0))
    return sum(output.prompt_logprobs[i][ids[i]].logprob for i in range(start, len(ids)))


def test_choices_by_hand(llm, tmp_path):
    [task] = evaluate(llm, [write(tmp_path / "c.jsonl", CHOICES)]).tasks
    plain, by_length = [], []
    for row, answer in zip(CHOICES, [0, 1, 0]):
        context = f"Question: {row['question']}\nAnswer:"
        scores = [logprob(llm, f"{context} {text}", len(llm.encode(context))) for text in row["choices"]]
        plain.append(max(range(len(scores)), key=scores.__getitem__) == answer)
        scores = [score / len(text) for score, text in zip(scores, row["choices"])]
        by_length.append(max(range(len(scores)), key=scores.__getitem__) == answer)
    assert task.metrics["accuracy"].rows == plain and task.metrics["accuracy_normalised"].rows == by_length
    assert task.figures()["accuracy"].n == 3


@pytest.mark.parametrize("stride", [None, 7])
def test_perplexity_by_hand(llm, tmp_path, stride):
    text = toys.TEXT[0]
    (tmp_path / "t.txt").write_text(text)
    [task] = evaluate(llm, [f"perplexity={tmp_path / 't.txt'}"], stride=stride).tasks
    ids = [0, *llm.tokenizer.encode(text, add_special_tokens=False)]
    [output] = llm.generate([ids], foveate.SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0))
    loss = -sum(output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids)))
    figures = task.figures()
    assert figures["perplexity"].value == pytest.approx(math.exp(loss / (len(ids) - 1)), rel=1e-4)
    assert figures["bits_per_byte"].value == pytest.approx(loss / math.log(2) / len(text.encode()), rel=1e-4)
    assert "one text" in task.note


def test_generation_and_questions(llm, tmp_path):
    said = (
        llm.generate(["the quick"], foveate.SamplingParams(temperature=0, max_tokens=6, stop=["\n"]))[0].outputs[0].text
    )
    rows = [{"prompt": "the quick", "answer": ["no", said]}, {"prompt": "the quick", "answer": "something else"}]
    [task] = evaluate(llm, [write(tmp_path / "g.jsonl", rows)], max_tokens=6).tasks
    assert task.kind == "generation" and task.metrics["exact_match"].rows == [1.0, 0.0]
    squad = [{"question": "who?", "context": "the fox", "answers": {"text": ["fox"], "answer_start": [4]}}]
    [task] = evaluate(llm, [write(tmp_path / "q.jsonl", squad)], max_tokens=4).tasks
    assert task.kind == "qa" and task.figures()["f1"].n == 1
    assert normalised("The  Fox, a dog!") == "fox dog" and f1("the fox ran", "a fox") == pytest.approx(2 / 3)
    assert f1("天气很好", "天气好") == pytest.approx(6 / 7)


def test_classes_by_both_kinds_of_models(llm, tmp_path):
    import pipeline_toys

    folder = tmp_path / "classes"
    folder.mkdir()
    pipeline_toys.save_encoder(folder, "BertForSequenceClassification", num_labels=2)
    classify = foveate.TextClassifier(folder)
    texts = ["ada lives in a hut.", "cab", "in", "lives, ada"]
    rows = [{"text": text, "label": classify(text)["label"]} for text in texts]
    rows[0]["label"] = next(label for label in classify.labels if label != rows[0]["label"])
    file = write(tmp_path / "k.jsonl", rows)
    [task] = evaluate(folder, [file]).tasks
    assert task.metrics["accuracy"].rows == [0.0, 1.0, 1.0, 1.0]
    if len({row["label"] for row in rows}) == 2:
        assert evaluate(llm, [file]).tasks[0].figures()["accuracy"].n == 4


def test_code_runs_only_when_allowed(llm, tmp_path):
    file = write(tmp_path / "p.jsonl", [{"prompt": "x = 1\n# ", "test": "assert x == 1"}])
    with pytest.raises(ValueError, match="--run-code"):
        evaluate(llm, [file])
    [task] = evaluate(llm, [file], run_code=True, max_tokens=2).tasks
    assert task.figures()["pass@1"].n == 1


@pytest.mark.parametrize(
    "program, passed, reason",
    [
        ("print('fine')", True, ""),
        ("raise ValueError('wrong')", False, "ValueError: wrong"),
        ("while True: pass", False, "it ran longer than 1 s"),
        ("x = bytearray(3 * 10**9)", False, "MemoryError"),
        ("open('big', 'wb').write(bytes(10**7))", False, "OSError"),
        ("import os; assert 'SECRET' not in os.environ and os.listdir() == ['.output']", True, ""),
    ],
)
def test_programs_have_limits(program, passed, reason, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    ran = run_python(program, Limits(seconds=1))
    assert (ran.passed == passed and reason in ran.reason) or "File too large" in ran.reason, ran


@pytest.mark.parametrize(
    "rows, sentence",
    [
        ([{"a": 1}], "has rows of a, which fit no task"),
        ([{"question": "x", "choices": ["a"], "answer": 0}], "has 1 choices; it needs at least 2"),
        ([{"question": "x", "choices": ["a", "b"], "answer": 5}], "names none of its 2 choices"),
        ([{"question": "x", "choices": ["a", "b"]}], "does not say which choice is right"),
        ([{"text": "x", "label": "a"}], "has the one class"),
        ([{"prompt": "x", "answer": []}], "has no answer"),
        ([], "has no rows"),
    ],
)
def test_wrong_files(llm, tmp_path, rows, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(llm, [write(tmp_path / "w.jsonl", rows)])


def test_a_comparison_fails_where_the_second_is_worse(folder, llm, tmp_path, capsys):
    better = [row | {"answer": 0} for row in CHOICES[:1]] * 30
    right = evaluate(llm, [write(tmp_path / "c.jsonl", better)])
    wrong = evaluate(llm, [write(tmp_path / "d.jsonl", [row | {"answer": 2} for row in better])])
    wrong.tasks[0].name = right.tasks[0].name
    ranked = sorted((right, wrong), key=lambda one: -one.tasks[0].figures()["accuracy"].value)
    if ranked[0].tasks[0].figures()["accuracy"].value > ranked[1].tasks[0].figures()["accuracy"].value:
        assert compare(*ranked).worse == ["c.jsonl"] and compare(*reversed(ranked)).worse == []
    (tmp_path / "other").mkdir()
    other = toys.folder(tmp_path / "other")
    rows = [{"text": text} for text in toys.TEXT for _ in range(4)]
    file = write(tmp_path / "t.jsonl", rows)
    command = ["eval", "--model", str(folder), str(file), "--max-model-len", "128", "--compare"]
    assert main([*command, str(other), "--fail-if-worse"]) == 0
    assert "no difference shown" in capsys.readouterr().out
    assert (
        main([*command, str(other), "--json", "--markdown", str(tmp_path / "r.md"), "--png", str(tmp_path / "r.png")])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["differences"][0]["n"] == 12 and found["worse"] == []
    assert "| t.jsonl |" in (tmp_path / "r.md").read_text() and (tmp_path / "r.png").stat().st_size > 1000
    assert main(["eval", "--model", str(folder)]) == 2
    assert main(["eval", "--model", str(folder), str(file), "--fail-if-worse"]) == 2
