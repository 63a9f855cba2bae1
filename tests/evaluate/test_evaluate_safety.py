"""Bias, safety and robustness: figures by hand on tiny models, the shapes of public sets, and the small data of our own."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import foveate
import generation_toys as toys
import pipeline_toys
from foveate.evaluate import evaluate, masked, model_card, safety
from foveate.evaluate.rows import rows
from foveate.evaluate.tasks import score_texts


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return foveate.LLM(toys.folder(tmp_path_factory.mktemp("biased")), num_pages=512, page_size=4, progress=False)


@pytest.fixture(scope="module")
def fill(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked")
    pipeline_toys.save_encoder(folder, "BertForMaskedLM")
    return foveate.FillMask(folder)


def test_pseudo_log_likelihood_by_hand(fill):
    text = "ada lives in a hut."
    found = masked.token_log_likelihoods(fill, text)
    ids = fill.tokenizer.backend.encode(text).ids
    assert [token for token, _ in found] == ids[1:-1]
    mask = fill.tokenizer.backend.token_to_id("[MASK]")
    for at, (token, value) in enumerate(found, 1):
        tokens = torch.tensor([ids[:at] + [mask] + ids[at + 1 :]])
        [row] = masked.run_packed(
            fill.model, [masked._Encoding(tokens[0].tolist(), [0] * len(ids))], fill._masked_logits
        )[0]
        assert value == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-5)


def test_pairs_compare_what_they_have_in_common(fill):
    left, right = masked.pair_scores(fill, "ada lives in a hut.", "bob lives in a hut.")
    assert left != right and masked.pair_scores(fill, "ada lives.", "ada lives.")[0] == pytest.approx(
        masked.totals(fill, ["ada lives."])[0], abs=1e-5
    )


def test_pairs_of_a_causal_model(llm):
    data = [
        {"more": "the quick fox", "less": "the lazy dog", "type": "a"},
        {
            "sent_more": "again and again",
            "sent_less": "over the lazy",
            "bias_type": "b",
            "stereo_antistereo": "antistereo",
        },
        {"sentence": "the [MASK] jumps", "mask1": "fox", "mask2": "dog", "bias_type": "a"},
    ]
    texts = ["the quick fox", "the lazy dog", "over the lazy", "again and again", "the fox jumps", "the dog jumps"]
    totals = [one.total for one in score_texts(llm, [("", text) for text in texts])]
    expected = [float(totals[i] > totals[i + 1]) for i in (0, 2, 4)]
    found = safety.pairs(llm, data, "p")
    assert found.metrics["stereotype_share"].rows == expected and found.metrics["share a"].rows == [
        expected[0],
        expected[2],
    ]


def test_icat_of_known_models():
    def score(stereotype, meaning):
        return safety.icat(np.array([(stereotype, meaning)]))

    assert score(1, 1) == 0 and score(0.5, 1) == 100 and score(0.5, 0.5) == 50


@pytest.mark.parametrize("suite", ["bias", "safety", "robustness"])
def test_suites_run_on_their_own_data(llm, suite):
    llm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    results = evaluate(llm, suites=[suite], limit=3, max_tokens=3)
    assert [task.kind for task in results.tasks] == [kind for kind, _ in safety.SUITES[suite]]
    for task in results.tasks:
        for name, one in task.figures().items():
            assert one.n >= 1 and (one.low <= one.value + 1e-9 and one.value <= one.high + 1e-9), (task.name, name)
    card = model_card(results, uses=["Tests."])
    assert "Not measured." in card and "- Tests." in card and f"## {suite.capitalize()}" in card


def test_data_of_our_own_has_the_shapes():
    for parts in safety.SUITES.values():
        for _, file in parts:
            assert len(rows(safety.DATA / file)) >= 8


def test_exposure_of_a_secret_that_the_model_prefers(llm, monkeypatch):
    class One:
        def __init__(self, total):
            self.total = total

    monkeypatch.setattr(
        safety.tasks,
        "score_texts",
        lambda model, pairs, *rest: [One(0.0 if text == " 123-45" else -1.0) for _, text in pairs],
    )
    found = safety.secrets(llm, [{"prompt": "the", "secret": "123-45"}], "s", alternatives=15)
    assert found.metrics["exposure"].rows == [4.0] and found.metrics["extracted"].rows == [0.0]


def test_personal_data_that_was_not_asked_for(llm, monkeypatch):
    class Output:
        def __init__(self, text):
            self.outputs = [type("Sample", (), {"text": text})()]

    said = ["call ada@example.org", "mail bob@example.org", "nothing"]
    monkeypatch.setattr(llm, "generate", lambda prompts, *a, **k: [Output(text) for text in said], raising=False)
    prompts = [{"prompt": "x"}, {"prompt": "bob@example.org is"}, {"prompt": "y"}]
    assert safety.personal(llm, prompts, "p").metrics["leaked_share"].rows == [1.0, 0.0, 0.0]
    said[:] = ["I'm sorry, but I can't.", "Sure: here it is", "抱歉，我不能这样做"]
    rows_ = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c", "harmful": False}]
    found = safety.refusals(llm, rows_, "r", chat=False).metrics
    assert found["refused_harmful"].rows == [1.0, 0.0] and found["refused_harmless"].rows == [1.0]
    assert (
        safety.toxicity(llm, rows_, "t", score=lambda texts: [0.7 for _ in texts]).figures()["toxic_share"].value == 1
    )


def test_typing_errors():
    text = "What is the capital of France?"
    assert safety.misspelt(text, 0.0, random.Random(1)) == text
    changed = safety.misspelt(text, 0.5, random.Random(1))
    assert changed != text and [w[0] for w in changed.split()] == [w[0] for w in text.split()]


@pytest.mark.parametrize(
    "kind, row, sentence",
    [
        ("pairs", {"more": "a"}, "has no less"), ("stereotypes", {"context": "a"}, "has no stereotype"),
        ("pronouns", {"sentence": "he"}, "needs a sentence with"), ("counterfactual", {"text": "a"}, "needs a text with"),
        ("secrets", {"prompt": "a"}, "needs a secret"), ("robustness", {"prompt": "a", "answer": "b"}, "typing errors are tried on"),
    ],
)  # fmt: skip
def test_wrong_rows(llm, tmp_path, kind, row, sentence):
    (tmp_path / "w.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=sentence):
        evaluate(llm, [f"{kind}={tmp_path / 'w.jsonl'}"])
