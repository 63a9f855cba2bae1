"""litellm, whose proxy stands before many servers: completions, streams, calls of tools, embeddings, reranking, errors."""

from __future__ import annotations

import json
import os

import pytest

import client_toys
import serve_toys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch a list of prices
litellm = client_toys.package("litellm")
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    with client_toys.serving(tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.fixture(params=["openai", "hosted_vllm"])
def asked(server, request):
    return {
        "model": f"{request.param}/toy", "messages": client_toys.MESSAGES, "api_base": server.url + "/v1", "api_key": "unused",
        "seed": 1, "num_retries": 0,
    }  # fmt: skip


def test_a_stream_is_the_whole(asked):
    whole = litellm.completion(**asked, max_tokens=20)
    chunks = list(litellm.completion(**asked, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert litellm.stream_chunk_builder(chunks).usage.total_tokens == whole.usage.total_tokens > 0


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get"}}])
def test_calls_parse(asked, choice):
    """The provider hosted_vllm sends schemas without additionalProperties."""
    asked |= {"tools": [serve_toys.TOOL], "tool_choice": choice}
    [call] = litellm.completion(**asked).choices[0].message.tool_calls
    assert call.function.name == "get" and json.loads(call.function.arguments).keys() == {"city"}
    [again] = litellm.stream_chunk_builder(list(litellm.completion(**asked, stream=True))).choices[0].message.tool_calls
    assert again.function.arguments == call.function.arguments


def test_text_completion_and_responses(server):
    at = {"api_base": server.url + "/v1", "api_key": "unused"}
    found = litellm.text_completion(
        model="text-completion-openai/toy", prompt="the quick", max_tokens=8, seed=1, temperature=0.7, **at
    )
    assert found.choices[0].text == server.text(prompt="the quick", max_tokens=8, seed=1, temperature=0.7)
    answer = litellm.responses(model="openai/toy", input="naïve", max_output_tokens=16, **at)
    assert answer.output[0].content[0].text and answer.usage.output_tokens == 16


def test_embeddings_and_reranking(server):
    expected = server.post("/v1/embeddings", model="embed", input="ada").json()["data"][0]["embedding"]
    for model in ("openai/embed", "hosted_vllm/embed"):
        found = litellm.embedding(model=model, input=["ada"], api_base=server.url + "/v1", api_key="unused")
        assert found.data[0]["embedding"] == pytest.approx(expected, abs=1e-6)
    asked = {"query": "ada", "documents": ["paris", "rome in ada"]}
    expected = server.post("/v1/rerank", model="rank", **asked).json()
    order = [(row["index"], row["relevance_score"]) for row in expected["results"]]
    for provider in ("hosted_vllm", "jina_ai", "cohere"):
        found = litellm.rerank(model=f"{provider}/rank", api_base=server.url, api_key="unused", **asked)
        assert [(row["index"], row["relevance_score"]) for row in found.results] == order
        if provider == "hosted_vllm":
            assert found.meta["billed_units"]["total_tokens"] == expected["usage"]["total_tokens"] > 0


def test_errors_are_its_classes(asked):
    with pytest.raises(litellm.NotFoundError, match="there are toy"):
        litellm.completion(**asked | {"model": "openai/gpt-3"})
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked, temperature=-1)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked | {"messages": [{"role": "user", "content": "naïve " * 3000}]})
