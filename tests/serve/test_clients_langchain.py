"""langchain-openai: messages, streams, tools, structured output by each of its methods, embeddings."""

from __future__ import annotations

from typing import Literal

import pytest

import client_toys

langchain_openai = client_toys.package("langchain_openai")
messages = client_toys.package("langchain_core.messages")
from pydantic import BaseModel  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


class Weather(BaseModel):
    """What the weather is in a city."""

    city: Literal["Rome", "Oslo"]
    warm: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with client_toys.serving(tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.fixture(scope="module")
def at(server):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("LANGSMITH_TRACING", "false")
        yield {"base_url": server.url + "/v1", "api_key": "unused", "max_retries": 0}


@pytest.fixture(scope="module", params=[False, True], ids=["chat", "responses"])
def model(at, request):
    return langchain_openai.ChatOpenAI(model="toy", temperature=0, max_tokens=60, use_responses_api=request.param, **at)


def text(message) -> str:
    return message.content if isinstance(message.content, str) else "".join(part["text"] for part in message.content)


def test_a_stream_is_the_whole(model):
    whole = model.invoke("naïve")
    assert "".join(map(text, model.stream("naïve"))) == text(whole)
    assert whole.usage_metadata["output_tokens"] > 0
    assert next(text(one) for one in model.batch(["naïve", "x"])) == text(whole)


@pytest.mark.parametrize("choice", ["any", "Weather"])
def test_tools_that_must_be_called(model, choice):
    """And the tool's answer goes back in the next turn."""
    asking = model.bind_tools([Weather], tool_choice=choice)
    said = asking.invoke("x")
    [call] = said.tool_calls
    assert call["name"] == "Weather" and Weather(**call["args"]) and not said.invalid_tool_calls
    pieces = list(asking.stream("x"))
    joined = pieces[0]
    for piece in pieces[1:]:
        joined = joined + piece
    assert [(one["name"], one["args"]) for one in joined.tool_calls] == [("Weather", call["args"])]
    answered = [messages.HumanMessage("x"), said, messages.ToolMessage("sunny", tool_call_id=call["id"])]
    assert model.invoke(answered).usage_metadata["input_tokens"] > model.invoke("x").usage_metadata["input_tokens"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model, method):
    assert isinstance(model.with_structured_output(Weather, method=method).invoke("x"), Weather)


def test_embeddings(server, at):
    """By default it sends ids of OpenAI's tokenizer, which must not become an embedding of other words."""
    expected = server.post("/v1/embeddings", model="embed", input="ada").json()["data"][0]["embedding"]
    texts = langchain_openai.OpenAIEmbeddings(model="embed", check_embedding_ctx_length=False, **at)
    assert texts.embed_query("ada") == pytest.approx(expected, abs=1e-6)
    assert len(texts.embed_documents(["ada", "x"])) == 2
    ids = server.error(400, "/v1/embeddings", model="embed", input=[[2649]])["message"]
    assert "check_embedding_ctx_length=False" in ids


def test_completions(server, at):
    found = langchain_openai.OpenAI(model="toy", max_tokens=8, temperature=0, **at)
    assert found.invoke("the quick") == server.text(prompt="the quick", max_tokens=8, temperature=0)
    assert "".join(found.stream("the quick")) == found.invoke("the quick")
