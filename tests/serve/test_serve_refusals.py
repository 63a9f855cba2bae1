"""Bodies that are wrong: a 400 with the field and a sentence, never a 5xx, never silence; and the next good request works."""

from __future__ import annotations

import random

import pytest

import serve_toys

GOOD = {"prompt": "x", "max_tokens": 2, "seed": 1, "ignore_eos": True}


@pytest.mark.parametrize(
    "changes, param, sentence",
    [
        ({"temprature": 1}, "temprature", "ignores none"),
        ({"temperature": "hot"}, "temperature", '"hot"'),
        ({"temperature": -1}, "temperature", "-1"),
        ({"temperature": True}, "temperature", "true"),
        ({"n": 0}, "n", "n=0"),
        ({"n": 1.5}, "n", "1.5"),
        ({"max_tokens": -3}, "max_tokens", None),
        ({"top_p": 0}, "top_p", "top_p=0"),
        ({"top_k": "3"}, "top_k", '"3"'),
        ({"prompt": 5}, "prompt", "5"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ""}, None, "empty"),
        ({"prompt": [[]]}, None, "empty"),
        ({"prompt": ["a", 1]}, "prompt", None),
        ({"prompt": [999999]}, None, "999999"),
        ({"prompt": [-1]}, None, "-1"),
        ({"prompt": None}, "prompt", "missing"),
        ({"stop": ""}, "stop", "stop"),
        ({"stop": ["a"] * 99}, "stop", "99"),
        ({"stop": 3}, "stop", None),
        ({"logprobs": 21}, "logprobs", "0 to 20"),
        ({"logprobs": -1}, "logprobs", "-1"),
        ({"prompt_logprobs": 99}, "prompt_logprobs", "99"),
        ({"logit_bias": {"fox": 1}}, "logit_bias", "fox"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "101"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"seed": -1}, "seed", "-1"),
        ({"seed": 2**70}, "seed", None),
        ({"best_of": 1, "n": 2}, "best_of", "best_of=1"),
        ({"best_of": 3, "stream": True}, "best_of", "streamed"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"suffix": "end"}, "suffix", "no tokens for fill-in-the-middle"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", None),
        ({"echo": "yes"}, "echo", None),
        ({"presence_penalty": 3}, "presence_penalty", "3"),
        ({"max_tokens": 1, "min_tokens": -1}, "min_tokens", None),
        ({"service_tier": "flex"}, "service_tier", None),
        ({"bad_words": [""]}, "bad_words", None),
        ({"stop_token_ids": [99999]}, None, "99999"),
        ({"prompt_lookup": 1000}, "prompt_lookup", None),
    ],
)
def test_fields_of_completions(toy, changes, param, sentence):
    error = toy.error(400, **(GOOD | changes))
    assert error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param, error
    assert sentence is None or sentence in error["message"], error


@pytest.mark.parametrize(
    "changes, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
        ({"continue_final_message": True}, None),
    ],
)
def test_fields_of_chats(toy, changes, param):
    error = toy.error(400, "/v1/chat/completions", **({"messages": [{"role": "user", "content": "x"}]} | changes))
    assert param is None or error["param"] == param, error


def test_values_that_ask_for_nothing_are_taken(toy):
    empty = {
        "store": False,
        "service_tier": "auto",
        "suffix": "",
        "best_of": None,
        "logit_bias": None,
        "stop": [],
        "user": "me",
        "metadata": {"a": "b"},
    }
    assert toy.text(**GOOD, **empty) == toy.text(**GOOD)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"5",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": ' + b"[" * 100_000,
        b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/embeddings"])
def test_bodies_that_are_no_request(toy, path, body):
    found = toy.client.post(toy.url + path, content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400, found.text
    assert found.json()["error"]["message"] and len(found.text) < 2000


def test_a_prompt_that_is_too_long(toy):
    error = toy.error(400, **(GOOD | {"prompt": [5] * 1000}))
    assert error["code"] == "context_length_exceeded" and "1000" in error["message"] and "256" in error["message"]
    assert error["message"].startswith("the prompt is too long: it has 1000 tokens")  # by which litellm knows it
    error = toy.error(400, "/v1/chat/completions", messages=[{"role": "user", "content": "fox " * 400}])
    assert error["code"] == "context_length_exceeded"


def test_other_kinds_of_models_are_named(toy):
    assert "Reranker" in toy.error(400, "/rerank", query="x", documents=["y"])["message"]


def test_random_bodies_never_give_a_5xx(toy):
    """Fields with values of other types, in 500 mixtures; then a good request, which gives what it gave before."""
    before = toy.text(**GOOD)
    random_values = [
        None,
        True,
        False,
        0,
        -1,
        3,
        2**70,
        0.5,
        -1e300,
        "",
        "x",
        "\u0000",
        "😀",
        [],
        {},
        [[]],
        ["a"],
        [1],
        {"a": 1},
        [None],
        "json_object",
        {"type": "text"},
    ]
    from foveate.serve.protocol import (
        AnswersBody,
        ChatBody,
        CompletionBody,
        DetokenizeBody,
        InfillBody,
        RerankBody,
        TokenizeBody,
    )
    from foveate.serve.responses_protocol import ResponsesBody

    kinds = {
        "/v1/completions": CompletionBody,
        "/v1/chat/completions": ChatBody,
        "/tokenize": TokenizeBody,
        "/detokenize": DetokenizeBody,
        "/rerank": RerankBody,
        "/v1/responses": ResponsesBody,
        "/v1/answers": AnswersBody,
        "/infill": InfillBody,
    }

    def names(kind) -> list[str]:
        return list(kind.model_fields)

    rng, seen = random.Random(5), set()
    good = {
        "prompt": "x",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
        "tokens": [3],
        "query": "x",
        "documents": ["y"],
        "input": "x",
        "max_output_tokens": 1,
    }
    for _ in range(500):
        path, kind = rng.choice(list(kinds.items()))
        body = {name: value for name, value in good.items() if name in names(kind)}
        for name in rng.sample(names(kind), min(len(names(kind)), rng.randint(1, 3))):
            body[name] = rng.choice(random_values)
        if body.get("stream"):
            body["stream"] = False
        found = toy.post(path, **body)
        seen.add(found.status_code)
        assert found.status_code in (200, 400, 404), (path, body, found.text)
        if found.status_code >= 400:
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert seen >= {200, 400} and toy.text(**GOOD) == before
    toy.wait(toy.idle)


def test_bytes_that_are_no_http(toy):
    for data in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    ):
        answer = serve_toys.raw(toy.url, data, wait=0.3)
        assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
    assert toy.text(**GOOD)
