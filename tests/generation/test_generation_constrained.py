"""Output that follows a JSON schema or a regular expression, whatever the model would rather say."""

from __future__ import annotations

import json
import re

import pytest

import generation_toys as toys
from foveate.generation import SamplingParams
from foveate.generation.constrained import ascii_digits
from foveate.generation.detokenizer import special_ids

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}


def drain(engine, requests):
    for i, (prompt, params) in enumerate(requests):
        engine.add(str(i), prompt, params)
    outputs = toys.drain(engine)
    return [outputs[str(i)].outputs for i in range(len(requests))]


def check_against_schema(text):
    found = json.loads(text)
    assert list(found) == ["name", "count", "tags"]
    assert isinstance(found["name"], str) and len(found["name"]) <= 8
    assert 0 <= found["count"] <= 99 and set(found["tags"]) <= {"a", "b"} and len(found["tags"]) <= 3


def test_grammars_and_free_requests_share_a_batch():
    prompts = toys.prompts(6)
    free = SamplingParams(temperature=0.0, max_tokens=25)
    requests = [
        (prompts[0], SamplingParams(json_schema=SCHEMA, max_tokens=120, seed=0, n=4)),
        (prompts[1], free),
        (prompts[2], SamplingParams(json_schema=json.dumps(SCHEMA), max_tokens=120, temperature=0.0)),
        (prompts[3], SamplingParams(regex=r"[a-f]{3}-\d{2,4}", max_tokens=40, seed=1, n=3)),
        (prompts[4], SamplingParams(regex=r"(yes|no)", max_tokens=10, temperature=0.0, logprobs=1)),
    ]
    outputs = drain(toys.engine(num_pages=200), requests)
    for sample in outputs[0] + outputs[2]:
        assert sample.finish_reason == "stop"
        check_against_schema(sample.text)
    assert len({sample.text for sample in outputs[0]}) > 1
    for sample in outputs[3]:
        assert sample.finish_reason == "stop" and re.fullmatch(r"[a-f]{3}-\d{2,4}", sample.text)
    assert toys.EOS not in outputs[4][0].token_ids, "a complete output needs no end token"
    assert outputs[4][0].text in ("yes", "no") and len(outputs[4][0].logprobs) == len(outputs[4][0].token_ids)
    assert outputs[1][0].token_ids == toys.greedy(prompts[1], 25)
    assert [[s.token_ids for s in o] for o in outputs] == [
        [s.token_ids for s in drain(toys.engine(num_pages=200), [request])[0]] for request in requests
    ]


def test_preemption_and_drafts_keep_the_place_in_the_grammar():
    prompts = toys.prompts(3, 20, 25)
    params = SamplingParams(regex=r"((ab|cd)-){12}", max_tokens=80, seed=5)
    expected = [drain(toys.engine(num_pages=100), [(prompt, params)])[0][0].text for prompt in prompts]
    small = toys.engine(num_pages=30)
    outputs = drain(small, [(prompt, params.with_(prompt_lookup=3)) for prompt in prompts])
    assert small.stats.preemptions > 0 and small.stats.drafted_tokens > 0
    assert [o[0].text for o in outputs] == expected


def test_too_few_tokens_end_by_length():
    sample = drain(toys.engine(), [(toys.prompts(1)[0], SamplingParams(json_schema=SCHEMA, max_tokens=3, seed=0))])[0][
        0
    ]
    assert sample.finish_reason == "length" and '{"name": "'.startswith(sample.text)


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone():
    prompts = toys.prompts(2)
    engine = toys.engine()
    engine.add("a", prompts[0], SamplingParams(regex="[a-z]{20}", max_tokens=40, temperature=0.0))
    engine.add("b", prompts[1], SamplingParams(max_tokens=10, temperature=0.0))
    engine.step()
    matcher = engine._requests["a"].samples[0].matcher
    matcher._matcher.consume_token(toys.tokenizer().encode("7")[0])  # as if llguidance had reached a limit
    outputs = toys.drain(engine)
    ended = outputs["a"].outputs[0]
    assert ended.finish_reason == "abort" and ended.stop_reason.startswith(
        "the grammar cannot be followed any further: "
    )
    assert outputs["b"].outputs[0].token_ids == toys.greedy(prompts[1], 10)
    toys.check_pages(engine)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"regex": "a{2,3"}, "regex cannot be followed: .*unclosed counted repetition"),
        ({"json_schema": {"type": "nonsense"}}, "json_schema cannot be followed: .*nonsense"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_reason(options, sentence):
    with pytest.raises(ValueError, match=re.compile(sentence, re.DOTALL)):
        toys.engine().add("a", [5], SamplingParams(**options))


def test_a_grammar_needs_a_tokenizer():
    with pytest.raises(ValueError, match="need a tokenizer, and this model has none"):
        toys.engine(tokenizer=None).add("a", [5], SamplingParams(regex="a"))


def test_text_that_looks_like_a_special_token_is_text():
    tokenizer = toys.tokenizer()
    special = [tokenizer.id_to_bytes(token).decode() for token in sorted(special_ids(tokenizer))]
    for name in special[:3]:
        regex = re.escape(name) + "a"
        [[found]] = drain(toys.engine(), [(toys.prompts(1)[0], SamplingParams(regex=regex, max_tokens=40))])
        assert found.text == name + "a" and not set(found.token_ids) & special_ids(tokenizer) - tokenizer.eos_ids


@pytest.mark.parametrize("regex, expected", [
    (r"\d{3}-\d", "[0-9]{3}-[0-9]"), (r"[\d.]+", "[0-9.]+"), (r"\\d", r"\\d"), (r"\D\d", "[^0-9][0-9]"), (r"[\]\d]x\d", r"[\]0-9]x[0-9]"),
])  # fmt: skip
def test_digits_of_an_expression_are_those_of_ascii(regex, expected):
    assert ascii_digits(regex) == expected
    prompt = toys.prompts(1)[0]
    if regex != r"\\d":
        outputs = drain(
            toys.engine(num_pages=90), [(prompt, SamplingParams(regex=regex, seed=i, max_tokens=30)) for i in range(5)]
        )
        for [found] in outputs:
            assert found.finish_reason == "length" or re.fullmatch(regex, found.text, re.ASCII), found.text
