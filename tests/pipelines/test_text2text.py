"""Text2Text: greedy and beam ids and scores equal to transformers' generate on random T5s, samples that follow the probabilities."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")

from foveate.nn import PackedLinear
from foveate.pipelines.text2text import Text2Text, Text2TextParams
from model_cases import assert_logits_close
from pipeline_toys import EOS, PAD, START, VOCAB
from pipeline_toys import make_text2text as make

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCES = [[5, 9, 3, 17, EOS], [20, 4, EOS], [7, 7, 8, 21, 11, 13, 6, EOS]]


def theirs(model: Any, max_new_tokens: int, **options: Any) -> Any:
    width = max(map(len, SOURCES))
    ids = torch.tensor([source + [PAD] * (width - len(source)) for source in SOURCES])
    mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in SOURCES])
    return model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip


def cut(row: torch.Tensor) -> list[int]:
    """Without the start token, and without padding after the end."""
    ids = row.tolist()[1:]
    return ids[: ids.index(EOS) + 1] if EOS in ids else ids


@pytest.mark.parametrize("seed", range(4))
def test_greedy_ids_are_those_of_transformers(seed: int, tmp_path: Path) -> None:
    model, ours = make(tmp_path, seed)
    expected = [cut(row) for row in theirs(model, 20).sequences]
    assert ours.generate(SOURCES, max_new_tokens=20) == expected
    assert [ours.generate([source], max_new_tokens=20)[0] for source in SOURCES] == expected
    texts = [" ".join(f"w{i}" for i in source[:-1]) for source in SOURCES]
    words = [" ".join(f"w{i}" for i in ids if i > 2) for ids in expected]
    assert ours(texts, max_new_tokens=20, batch_size=2) == words
    assert ours(texts[0], max_new_tokens=20) == words[0]


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_beams_are_those_of_transformers(length_penalty: float, early_stopping: Any, tmp_path: Path) -> None:
    lengths = Counter()
    for seed in range(3):
        model, ours = make(tmp_path, seed, 0.2)
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        out = theirs(model, 12, num_beams=3, num_return_sequences=3, **options)
        expected = [cut(row) for row in out.sequences]
        found = ours.beam_search(SOURCES, Text2TextParams(num_beams=3, max_new_tokens=12, **options))
        assert [h.tokens for hypotheses in found for h in hypotheses] == expected
        scores = torch.tensor([h.score for hypotheses in found for h in hypotheses])
        torch.testing.assert_close(scores, out.sequences_scores, rtol=1e-4, atol=1e-5)
        assert ours.generate(SOURCES, max_new_tokens=12, num_beams=3, **options) == expected[::3]
        lengths.update(len(ids) for ids in expected)
    assert len(lengths) > 2 or length_penalty == 2.0  # some end early, some do not; a high penalty rewards the longest


def test_both_ends_were_seen_in_greedy_outputs(tmp_path: Path) -> None:
    """The comparison above covers outputs that end and outputs that are cut."""
    ended = set()
    for seed in range(4):
        _, ours = make(tmp_path, seed)
        ended |= {ids[-1] == EOS for ids in ours.generate(SOURCES, max_new_tokens=20)}
    assert ended == {True, False}


def test_samples_follow_the_probabilities(tmp_path: Path) -> None:
    model, ours = make(tmp_path, 1)
    n = 3000
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(SOURCES[:1]), decoder_input_ids=torch.tensor([[START]])).logits[0, -1]
    p = (logits / 1.5).softmax(-1)
    p[p < p.topk(6).values[-1]] = 0
    p /= p.sum()
    drawn = [ids[0] for ids in ours.generate(SOURCES[:1] * n, max_new_tokens=1, temperature=1.5, top_k=6, seed=3)]
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB)
    assert not counts[p == 0].any()
    assert ((counts - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt() + 1e-6).all()


def test_a_seed_repeats_a_sample_whatever_the_batch(tmp_path: Path) -> None:
    _, ours = make(tmp_path)
    texts = ["w3 w4 w5", "w9", "w10 w11", "w9"]
    options = {"temperature": 1.3, "top_p": 0.9, "max_new_tokens": 15}
    once = ours(texts, seed=5, **options)
    assert once == ours(texts, seed=5, batch_size=1, **options) == ours(texts, seed=5, batch_size=3, **options)
    assert once != ours(texts, seed=6, **options)
    assert once[1] != once[3]  # equal texts are drawn independently
    assert ours(texts, seed=5, **(options | {"top_p": 1e-6})) == ours(texts, max_new_tokens=15)
    torch.manual_seed(1)
    first = ours(texts, **options)
    assert first != ours(texts, **options)
    torch.manual_seed(1)
    assert first == ours(texts, **options)


def test_quantised_weights_generate(tmp_path: Path) -> None:
    _, exact = make(tmp_path)
    packed = Text2Text(tmp_path, quantization="q8_0")
    assert isinstance(packed.model.lm_head, PackedLinear)
    tokens, target = torch.tensor(SOURCES[2:]), torch.tensor([[START, 5, 6]])
    with torch.no_grad():
        assert_logits_close(packed.model(tokens, target), exact.model(tokens, target), 0.05)
    assert len(packed.generate(SOURCES, num_beams=2, max_new_tokens=5)) == 3


@pytest.mark.parametrize("options", [
    {"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 6}, {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("num_beams", [1, 3])
def test_rules_about_what_has_come_are_those_of_transformers(options: dict, num_beams: int, tmp_path: Path) -> None:
    changed = 0
    for seed in range(2):
        model, ours = make(tmp_path, seed, 0.2)
        plain = [cut(row) for row in theirs(model, 12, num_beams=num_beams).sequences]
        expected = [cut(row) for row in theirs(model, 12, num_beams=num_beams, **options).sequences]
        assert ours.generate(SOURCES, max_new_tokens=12, num_beams=num_beams, **options) == expected
        changed += plain != expected
    assert changed, "the option changes nothing in these cases"


def test_the_checkpoints_own_settings_are_the_defaults(tmp_path: Path) -> None:
    model, _ = make(tmp_path, 0, 0.2)
    settings = {
        "num_beams": 3,
        "max_length": 9,
        "length_penalty": 2.0,
        "early_stopping": True,
        "no_repeat_ngram_size": 2,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    ours = Text2Text(tmp_path)
    names = {name: value for name, value in settings.items() if name != "max_length"}
    expected = [cut(row) for row in theirs(model, 8, **names).sequences]
    assert ours.default_params == Text2TextParams(max_new_tokens=8, **names) and ours.generate(SOURCES) == expected
    greedy = [cut(row) for row in theirs(model, 20, length_penalty=1.0).sequences]
    assert ours.generate(SOURCES, num_beams=1, max_new_tokens=20, no_repeat_ngram_size=0) == greedy
    (tmp_path / "generation_config.json").write_text(json.dumps({"num_beams": 2, "do_sample": True}))
    with pytest.raises(
        ValueError, match="generation_config.json cannot be followed: num_beams=2 searches and temperature=1.0"
    ):
        Text2Text(tmp_path)


def test_several_outputs_stop_strings_and_pieces(tmp_path: Path) -> None:
    _, ours = make(tmp_path, 0, 0.2)
    text = "w3 w4 w5"
    whole = ours(text, max_new_tokens=12)
    assert (
        "".join(ours.stream(text, max_new_tokens=12)) == whole and len(list(ours.stream(text, max_new_tokens=12))) > 1
    )
    word = whole.split()[-1]
    at = whole.index(word)
    for beams in (1, 3):
        stopped = ours(text, max_new_tokens=12, stop=word, num_beams=beams)
        assert word not in stopped and (beams > 1 or stopped == whole[:at])
    several = ours([text, "w7"], max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert [len(found) for found in several] == [2, 2] and several[0][0] == ours(text, max_new_tokens=8, num_beams=3)
    drawn = ours(text, max_new_tokens=8, temperature=1.0, seed=3, num_return_sequences=4)
    assert len(set(drawn)) > 1 and drawn == ours(
        text, max_new_tokens=8, temperature=1.0, seed=3, num_return_sequences=4
    )
    with pytest.raises(ValueError, match="num_return_sequences=2 needs as many beams, or a temperature"):
        ours(text, num_return_sequences=2)
    with pytest.raises(ValueError, match="only one output can be streamed"):
        ours.stream(text, num_beams=2)


def test_wrong_calls_are_said(tmp_path: Path) -> None:
    _, ours = make(tmp_path)
    for options, message in (
        ({"num_beams": 2, "temperature": 0.5}, "num_beams=2 searches and temperature=0.5 draws"),
        ({"num_beams": 0}, "num_beams=0 must be 1 or more"),
        ({"max_new_tokens": 0}, "max_tokens=0 must be"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"num_beams": 2, "early_stopping": "soon"}, "early_stopping='soon' must be True, False"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            ours("w3", **options)
    with pytest.raises(ValueError, match="a source has no tokens"):
        ours.generate([[3, EOS], []])
    assert ours([]) == ours.generate([]) == ours.generate([], num_beams=2) == []
    with pytest.raises(TypeError, match="Text2Text takes a foveate.models.encoder_decoder.EncoderDecoder, got Linear"):
        Text2Text(torch.nn.Linear(2, 2), ours.tokenizer)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json; pass tokenizer="):
        Text2Text(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="is of architecture 'llama'; text to text needs an encoder-decoder, .*t5"):
        Text2Text(tmp_path)
