"""Text2Text on every family of encoder-decoders: ids equal to transformers' generate, greedy and by beams, with its rules."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from encoder_decoder_toys import CASES, EOS, PAD, theirs
from foveate.pipelines.text2text import Text2Text, Text2TextParams
from pipeline_toys import text2text_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCES = [[5, 9, 3, 17, EOS], [20, 4, EOS], [7, 7, 8, 21, 11, 13, 6, EOS]]


def make(
    case: str, folder: Path, seed: int = 0, ends: float = 1.5, std: float = 0.35, **generation: Any
) -> tuple[Any, Text2Text]:
    """transformers' and ours; generation: of the generation_config.json, in place of the model's. ends: added to the end's logit."""
    model = theirs(case, seed, std)
    with torch.no_grad():  # ends come early in some outputs, late or never in others
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias[0, EOS] += ends
    model.save_pretrained(folder)
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    text2text_tokenizer().backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    return model, Text2Text(folder)


def expected(model: Any, max_new_tokens: int, **options: Any) -> list[list[int]]:
    width = max(map(len, SOURCES))
    ids = torch.tensor([source + [PAD] * (width - len(source)) for source in SOURCES])
    mask = torch.tensor([[1] * len(source) + [0] * (width - len(source)) for source in SOURCES])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
            use_cache=False,  # its cache for UMT5 has as many layers as the encoder
            **options,
        ).tolist()  # fmt: skip
    rows = [row[1:] for row in rows]
    return [row[: row.index(EOS) + 1] if EOS in row else [token for token in row if token != PAD] for row in rows]


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers(case: str, num_beams: int, tmp_path: Path) -> None:
    """Sources of unequal length in one batch, past the first growth of the cache."""
    model, ours = make(case, tmp_path, std=0.25)
    options = {"num_beams": num_beams, "suppress_tokens": [PAD]}
    found = ours.generate(SOURCES, max_new_tokens=24, **options)
    assert found == expected(model, 24, **options)
    assert [ours.generate([source], max_new_tokens=24, **options)[0] for source in SOURCES] == found


def rules(plain: list[list[int]]) -> dict[str, dict[str, Any]]:
    """By name; plain: the outputs without any, so that the words that must not come are some that do."""
    a, b, c = (row[0] for row in plain)
    return {
        "first": {"forced_bos_token_id": 9},
        "last": {"forced_eos_token_id": EOS},
        "first and last": {"forced_bos_token_id": 3, "forced_eos_token_id": EOS, "min_new_tokens": 6},
        "least": {"min_new_tokens": 8, "length_penalty": 2.0},
        "n-grams": {"no_repeat_ngram_size": 2},
        "n-grams of the source": {"encoder_no_repeat_ngram_size": 1, "no_repeat_ngram_size": 3},
        "bad words": {"bad_words_ids": [[a], [EOS], *(row[1:3] for row in plain if len(row) > 2), [8, 9, 10]]},
        "suppressed": {"suppress_tokens": sorted({PAD, a, b, c}), "renormalize_logits": True},
        "repetition": {"repetition_penalty": 1.6},
    }  # fmt: skip


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("rule", rules([[3], [3], [3]]))
def test_rules_are_those_of_transformers(rule: str, num_beams: int, tmp_path: Path) -> None:
    changed = 0
    for seed in range(2):
        model, ours = make("bart", tmp_path, seed, ends=4.0 if rule == "least" else 1.5)
        options: dict[str, Any] = {"suppress_tokens": [PAD], "num_beams": num_beams}
        plain = ours.generate(SOURCES, max_new_tokens=10, **options)
        options |= rules(plain)[rule]
        found = ours.generate(SOURCES, max_new_tokens=10, **options)
        assert found == expected(model, 10, **options)
        changed += found != plain
    assert changed, "the rule changes nothing in these cases"


def test_bad_words_by_their_text(tmp_path: Path) -> None:
    _, ours = make("bart", tmp_path)
    for beams in (1, 3):
        options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": beams, "suppress_tokens": [0, 1, 2]}
        word = ours("w3 w4 w5", **options).split()[0]
        assert word not in ours("w3 w4 w5", bad_words=[word], **options).split()


def test_the_settings_of_a_checkpoint(tmp_path: Path) -> None:
    """As of bart-large-cnn; then in the config.json, where files from before generation_config.json have them."""
    settings = {
        "num_beams": 3, "max_length": 14, "min_length": 5, "no_repeat_ngram_size": 3, "length_penalty": 2.0, "early_stopping": True,
        "forced_bos_token_id": 6, "forced_eos_token_id": EOS, "bad_words_ids": [[PAD]], "renormalize_logits": True,
    }  # fmt: skip
    model, ours = make("marian", tmp_path, **settings)
    options = {name: value for name, value in settings.items() if name not in ("max_length", "min_length")}
    wanted = expected(model, 13, min_new_tokens=4, **options)
    assert ours.generate(SOURCES) == wanted
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    assert Text2Text(tmp_path).default_params == ours.default_params
    assert Text2Text(tmp_path).generate(SOURCES) == wanted
    with pytest.raises(ValueError, match="min_new_tokens=4 must be at most max_new_tokens=3; set both"):
        ours("w3", max_new_tokens=3)


def test_settings_that_are_not_followed_are_said(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"have num_beam_groups=2, diversity_penalty=0.5, which Text2Text does not follow"
    ):
        make("bart", tmp_path, num_beam_groups=2, diversity_penalty=0.5, penalty_alpha=None)
    for settings, message in (
        ({"forced_bos_token_id": "x"}, "forced_bos_token_id"),
        ({"bad_words_ids": [[-4]]}, "bad_words_ids"),
        ({"decoder_start_token_id": -5}, "decoder_start_token_id"),
    ):
        with pytest.raises(ValueError, match=message):
            make("bart", tmp_path, **settings)


def test_what_contradicts_the_model_is_said(tmp_path: Path) -> None:
    _, ours = make("bart", tmp_path)
    assert ours.default_params.max_new_tokens == 60 == ours.max_source_tokens
    for options, message in (
        ({"max_new_tokens": 61}, "max_new_tokens=61 is more than the model's 60 positions"),
        ({"forced_bos_token_id": 99}, "forced_bos_token_id=99 is not an id of the model's vocabulary of 24"),
        ({"encoder_no_repeat_ngram_size": -1}, "encoder_no_repeat_ngram_size=-1 must be 0 or more"),
        ({"bad_words": [""]}, "bad_words=.* must be texts, none of them empty"),
        ({"bad_words_ids": [[]]}, "bad_words_ids=.* must be lists of token ids"),
        ({"suppress_tokens": list(range(24))}, "no token is allowed to come next"),
        ({"target_language": "de"}, "target_language='de' mean nothing to this model"),
    ):
        with pytest.raises(ValueError, match=message):
            ours("w3 w4", **options)
    long = " ".join(["w3"] * 80)
    with pytest.raises(ValueError, match="81 tokens do not fit the model's 60 positions; cut the text"):
        ours(long)
    assert ours.count(long) == 81
    words: dict[str, Any] = {"suppress_tokens": [0, 1, 2], "max_new_tokens": 5}
    assert ours(long, truncate=True, **words) == ours(" ".join(["w3"] * 59), **words) != ""


def test_samples_begin_and_end_as_they_must(tmp_path: Path) -> None:
    _, ours = make("bart", tmp_path)
    options = {"forced_bos_token_id": 9, "forced_eos_token_id": EOS, "min_new_tokens": 5, "temperature": 1.5, "seed": 4}
    rows = ours.generate(SOURCES[:1], max_new_tokens=5, num_return_sequences=6, **options)
    assert (
        all(row[0] == 9 and row[-1] == EOS and len(row) == 5 for row in rows) and len({tuple(row) for row in rows}) > 1
    )
    assert Text2TextParams(**options, max_new_tokens=5).forced("forced_bos_token_id") == [9]
