"""The objectives: what is hidden, what is predicted, what is measured; packed sequences leak nothing in any of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import foveate
from foveate.models import load_model, open_checkpoint
from foveate.models.bert import BertConfig, BertForMaskedLM
from foveate.models.encoder_decoder import DecoderCache
from foveate.models.sequences import PackedSequences
from foveate.models.t5 import T5, T5Config
from foveate.train import TrainConfig
from foveate.train.objectives.labels import find_classes
from foveate.train.objectives.masked_lm import MaskedLM
from foveate.train.objectives.question_answering import QuestionAnswering
from foveate.train.objectives.seq2seq import SpanCorruption
from foveate.train.objectives.squad_metric import exact_match, f1, scores
from objective_toys import BERT, T5_CONFIG, squad, unigram, wordpiece
from train_toys import WORDS, losses, run, sentences, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes):
    return TrainConfig(output_dir="x", train_data=["x"], model="x", **changes)


def masked(folder, **changes):
    return MaskedLM(config(objective="masked-lm", **changes), open_checkpoint(wordpiece(folder)).tokenizer(), 32)


def test_80_10_10(tmp_path):
    task = masked(tmp_path)
    tokens = np.full(100_000, 20, np.int32)
    seen, labels = task.hide(tokens, np.ones(len(tokens), np.uint8), np.random.default_rng(0))
    hidden = labels != -100
    assert hidden.sum() == 15_000 and (labels[hidden] == 20).all() and (seen[~hidden] == 20).all()
    shares = [(seen[hidden] == t).mean() for t in (task._mask_id, 20)]
    assert shares == pytest.approx([0.8, 0.1], abs=0.02)  # a random token is the same one now and then
    replaced = seen[hidden & (seen != 20) & (seen != task._mask_id)]
    assert replaced.min() >= 5 and len(np.unique(replaced)) > 30  # never a special token


def test_whole_words(tmp_path):
    task = masked(tmp_path, whole_word=True)
    columns = task.encode([{"text": "foxes jumping quick foxes running over foxes " * 3}])
    tokens, begins = columns["tokens"][0], columns["begins"][0]
    assert begins.sum() == 21 < len(tokens)
    word = np.cumsum(begins)
    for seed in range(20):
        _, labels = task.hide(tokens, begins, np.random.default_rng(seed))
        hidden = labels != -100
        assert all(len(set(hidden[word == w])) == 1 for w in set(word))
        assert round(0.15 * len(tokens)) <= hidden.sum() <= round(0.15 * len(tokens)) + 2


def test_masked_lm_learns(tmp_path):
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "the quick brown fox jumps over a lazy dog"}] * 30)
    result = run(
        tmp_path, objective="masked-lm", new_model=BERT, tokenizer=wordpiece(tmp_path), train_data=[data], eval_fraction=0.2,
        max_steps=80, learning_rate=1e-2,
    )  # fmt: skip
    assert result.metrics["accuracy"] > 0.9 and result.metrics["loss"] < 0.3 < losses(result)[0]
    import transformers

    theirs = transformers.BertForMaskedLM.from_pretrained(result.best).eval()
    tokens = torch.tensor([[2, 8, 9, 4, 10, 3]])
    assert torch.allclose(theirs(tokens).logits, result.model(tokens), atol=1e-4)
    assert torch.equal(load_model(result.best)(tokens), result.model(tokens))


def test_spans_come_back_together(tmp_path):
    tokenizer = open_checkpoint(unigram(tmp_path)).tokenizer()
    task = SpanCorruption(config(objective="span-corruption"), tokenizer, 60, T5_CONFIG)
    sentinels = task._sentinels.tolist()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(3, 20, task.length if seed else 2).astype(np.int32)
        source, target = (x.tolist() for x in task.corrupt(tokens, rng))
        hidden, spans = task._spans(len(tokens))
        assert len(source) == task._source_length(len(tokens)) <= 60 and len(target) == hidden + spans + 1
        assert source[-1] == target[-1] == 1 and [t for t in source if t in sentinels] == sentinels[:spans]
        parts, now = {}, None
        for t in target[:-1]:
            now = t if t in sentinels else now
            parts.setdefault(now, []).extend([] if t in sentinels else [t])
        whole = [x for t in source[:-1] for x in (parts[t] if t in sentinels else [t])]
        assert whole == tokens.tolist()
    assert task._source_length(task.length + 1) > 60


@pytest.mark.parametrize("objective", ["seq2seq", "span-corruption"])
def test_encoder_decoders_learn(tmp_path, objective):
    words = sorted(set(WORDS))
    pairs = list(itertools.pairwise(words)) * 6  # what comes next in the alphabet
    rows = [{"source": a, "target": b, "text": "the quick brown fox jumps over a lazy dog"} for a, b in pairs]
    data = [write_jsonl(tmp_path / "a.jsonl", rows)]
    result = run(
        tmp_path, objective=objective, new_model=T5_CONFIG, tokenizer=unigram(tmp_path), eval_data=data, max_steps=120,
        train_data=data, learning_rate=1e-2, max_length=40, batch_size=2,
    )  # fmt: skip
    assert result.metrics["loss"] < 0.5 * losses(result)[0]
    if objective == "seq2seq":
        text2text = foveate.Text2Text(str(result.last))
        assert text2text(rows[0]["source"], max_new_tokens=4).strip() == rows[0]["target"]
    import transformers

    theirs = transformers.T5ForConditionalGeneration.from_pretrained(result.last).eval()
    tokens = torch.tensor([[5, 6, 7, 1]])
    assert torch.allclose(theirs(tokens, decoder_input_ids=tokens).logits, result.model(tokens, tokens), atol=1e-4)


def test_padding_is_packing_in_every_objective(tmp_path):
    """One step over the same sequences, at a learning rate that makes the weights show the gradients."""
    rows = [{"source": t, "target": t.split()[0], "text": t, "label": len(t) % 3} for t in sentences(12)]
    data = [write_jsonl(tmp_path / "a.jsonl", rows)]
    bert, t5 = (BERT, wordpiece(tmp_path)), (T5_CONFIG, unigram(tmp_path))
    for objective, (model, tokenizer) in {
        "masked-lm": bert, "sequence-classification": bert, "seq2seq": t5, "span-corruption": t5,
    }.items():  # fmt: skip
        found = []
        for packing in (True, False):
            result = run(
                tmp_path / f"{objective}{packing}", objective=objective, new_model=model, tokenizer=tokenizer, train_data=data,
                eval_data=data, max_steps=1, learning_rate=1e-30, max_length=12, packing=packing, too_long="drop", batch_size=3,
            )  # fmt: skip
            found.append(result.metrics)
        assert found[0].keys() == found[1].keys()
        for name, value in found[0].items():
            assert value == pytest.approx(found[1][name], rel=1e-5), (objective, name)


def test_windows_have_their_answers(tmp_path):
    tokenizer = open_checkpoint(wordpiece(tmp_path)).tokenizer()
    task = QuestionAnswering(config(objective="question-answering", doc_stride=3), tokenizer, 16)
    context = "the quick brown fox jumps over a lazy dog and runs far away from here to there"
    answer = {"text": "dog and runs", "answer_start": context.index("dog and runs")}
    rows = [
        {"question": "who runs ?", "context": context, "answers": [answer]},
        {"question": "who runs ?", "context": context, "answers": []},
        {"question": "who ?", "context": context, "answers": {"text": ["the"], "answer_start": [0]}},
    ]
    columns = task.encode(rows)
    found = []
    for tokens, (begin, first, last) in zip(columns["tokens"], columns["places"]):
        assert len(tokens) <= 16 and tokens[0] == 2 and tokens[-1] == 3 and tokens[begin - 1] == 3
        found.append(tokenizer.decode(tokens[first : last + 1].tolist()))
    # 17 tokens of context: windows of 10, from 0 and 7; with the shorter question of 11, from 0 and 8
    assert found == ["", "dog and runs", "", "", "the", ""]
    rows[0]["answers"][0]["answer_start"] = 1
    with pytest.raises(ValueError, match="the answer 'dog and runs' is not at its answer_start 1"):
        task.encode(rows)


def test_question_answering_learns_and_answers(tmp_path):
    result = run(
        tmp_path, objective="question-answering", new_model=BERT, tokenizer=wordpiece(tmp_path), max_length=40, doc_stride=8,
        train_data=[squad(tmp_path, 200)], eval_data=[squad(tmp_path, 20, 1)], max_steps=300, learning_rate=5e-3, batch_size=8,
    )  # fmt: skip
    assert result.metrics["f1"] > 80 and result.metrics["f1"] >= result.metrics["exact_match"] > 70
    answer = foveate.QuestionAnswerer(str(result.best))(
        question="who jumps over ?", context="old stones here fox over a dog"
    )
    assert answer["answer"] == "fox"


def test_packed_logits_of_spans_are_those_of_each_window(tmp_path):
    """The loss of packed windows is the mean of the loss of each by itself."""
    tokenizer = wordpiece(tmp_path)
    results = [
        run(
            tmp_path / str(packing),
            objective="question-answering",
            new_model=BERT,
            tokenizer=tokenizer,
            max_length=24,
            doc_stride=4,
            train_data=[squad(tmp_path, 10)],
            eval_data=[squad(tmp_path, 10)],
            max_steps=1,
            learning_rate=1e-30,
            packing=packing,
        )
        for packing in (True, False)
    ]
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-5)


def test_the_metric_of_squad():
    assert exact_match("The Denver Broncos!", "denver broncos") == 1 and exact_match("Denver", "denver broncos") == 0
    assert f1("the big Denver team", "Denver team") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1("a", "the") == 1 and f1("x", "") == 0 and f1("x x", "x") == pytest.approx(2 / 3)
    assert scores(["x", "b"], [["y", "x"], ["c"]]) == {"exact_match": 50.0, "f1": 50.0}
    assert scores([""], [[]]) == {"exact_match": 100.0, "f1": 100.0}


def test_classification_learns(tmp_path):
    rows = [{"text": text, "label": ["no", "yes"]["fox" in text]} for text in sentences(120)]
    result = run(
        tmp_path, objective="sequence-classification", new_model=BERT, tokenizer=wordpiece(tmp_path), eval_fraction=0.2,
        train_data=[write_jsonl(tmp_path / "a.jsonl", rows)], max_steps=80, learning_rate=5e-3,
    )  # fmt: skip
    assert result.metrics["accuracy"] > 0.9
    import transformers

    theirs = transformers.BertForSequenceClassification.from_pretrained(result.best).eval()
    assert theirs.config.id2label == {0: "no", 1: "yes"}
    tokens = torch.tensor([[2, 8, 9, 10, 3]])
    assert torch.allclose(theirs(tokens).logits, result.model(tokens), atol=1e-4)


@pytest.mark.parametrize("unanswerable", [False, True])
def test_questions_without_an_answer_are_scored(tmp_path, monkeypatch, unanswerable):
    """As in SQuAD 2: a model that answers all as it should has 100, and where all have answers "" does not compete."""
    asked = []

    class Perfect:
        def __init__(self, *args):
            pass

        def __call__(self, questions, contexts, *, handle_impossible_answer, **options):
            asked.append(handle_impossible_answer)
            return [{"answer": "" if q == "none ?" and handle_impossible_answer else "fox"} for q in questions]

    monkeypatch.setattr("foveate.train.objectives.question_answering.QuestionAnswerer", Perfect)
    rows = [{"question": "who ?", "context": "the fox", "answers": [{"text": "fox", "answer_start": 4}]}]
    rows += [{"question": "none ?", "context": "the fox", "answers": []}] * unanswerable
    settings = config(objective="question-answering", eval_data=[write_jsonl(tmp_path / "a.jsonl", rows)])
    task = QuestionAnswering(settings, open_checkpoint(wordpiece(tmp_path)).tokenizer(), 40)
    assert task.task_metrics(None) == {"exact_match": 100.0, "f1": 100.0} and asked == [unanswerable]


def test_class_names():
    rows = [{"label": x} for x in (10, 2, 0)]
    assert find_classes(rows, "label", []).names == ["0", "2", "10"]
    assert find_classes([{"label": "b"}], "label", ["b", "a"]).names == ["b", "a"]


def test_packed_encoders_leak_nothing():
    lengths = [4, 7, 2]
    bert = BertForMaskedLM(BertConfig.from_hf(BERT | {"vocab_size": 40})).eval()
    tokens = torch.randint(5, 40, (1, 13))
    whole = bert(tokens, packed=PackedSequences.of(lengths))
    for part, alone in zip(whole.split(lengths, 1), tokens.split(lengths, 1)):
        assert torch.allclose(part, bert(alone), atol=1e-5)
    with pytest.raises(ValueError, match="packed sequences have no padding"):
        bert(tokens, packed=PackedSequences.of(lengths), kv_lens=torch.tensor([13], dtype=torch.int32))


def test_packed_encoder_decoders_leak_nothing():
    """The gradient of a target reaches its own source only."""
    model = T5(T5Config.from_hf(T5_CONFIG | {"vocab_size": 40})).eval()
    sources, targets = [5, 3, 6], [2, 4, 3]
    tokens, inputs = torch.randint(2, 40, (1, 14)), torch.randint(2, 40, (1, 9))
    kept = []
    handle = model.encoder.dropout.register_forward_hook(lambda m, args, out: kept.append(args[0]))
    model.shared.register_forward_hook(lambda m, args, out: out.retain_grad())
    packed = PackedSequences.of(sources)
    encoded = model.encode(tokens, packed=packed)
    embedded = kept[0]
    handle.remove()
    out = model.decode(
        inputs, DecoderCache(model, encoded, None, keep=False, packed=packed), PackedSequences.of(targets)
    )
    out[0, 2:6].square().sum().backward()
    grad = embedded.grad[0]
    assert (
        torch.count_nonzero(grad[:5]) == 0 and torch.count_nonzero(grad[8:]) == 0 and torch.count_nonzero(grad[5:8]) > 0
    )
    for part, source, target in zip(out.split(targets, 1), tokens.split(sources, 1), inputs.split(targets, 1)):
        alone = model.decode(target, DecoderCache(model, model.encode(source), None, keep=False))
        assert torch.allclose(part, alone, atol=1e-5)
