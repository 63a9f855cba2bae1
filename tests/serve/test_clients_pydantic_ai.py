"""pydantic-ai: agents whose tools are called and whose output is an object, over chats and responses, whole and streamed."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest

import client_toys

pydantic_ai = client_toys.package("pydantic_ai")
openai_models = client_toys.package("pydantic_ai.models.openai")
providers = client_toys.package("pydantic_ai.providers.openai")
from pydantic import BaseModel  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    warm: bool


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with client_toys.serving(tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel"])
def model(server, request, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    provider = providers.OpenAIProvider(base_url=server.url + "/v1", api_key="unused")
    return getattr(openai_models, request.param)("toy", provider=provider)


SETTINGS = {"max_tokens": 200, "temperature": 1.0}


def test_text(model):
    assert pydantic_ai.Agent(model, model_settings={"max_tokens": 12}).run_sync("naïve").output


def test_an_object(model):
    agent = pydantic_ai.Agent(model, output_type=Weather, model_settings=SETTINGS)
    assert isinstance(agent.run_sync("naïve").output, Weather)
    native = pydantic_ai.Agent(model, output_type=pydantic_ai.NativeOutput(Weather), model_settings=SETTINGS)
    assert isinstance(native.run_sync("naïve").output, Weather)


def test_a_streamed_object(model):
    async def last():
        agent = pydantic_ai.Agent(model, output_type=Weather, model_settings=SETTINGS)
        async with agent.run_stream("naïve") as stream:
            return await stream.get_output()

    assert isinstance(asyncio.run(last()), Weather)


def test_arguments_of_tools_always_parse(model):
    """A model of random weights calls one of its two functions in each of ten runs, with arguments that the tool's types take."""
    seen = []
    agent = pydantic_ai.Agent(model, output_type=Weather, model_settings=SETTINGS)

    @agent.tool_plain
    def forecast(city: Literal["Rome", "Oslo"], days: Literal[1, 2, 3]) -> str:
        seen.append((city, days))
        return "sunny"

    ended = 0
    for _ in range(10):
        limits = pydantic_ai.UsageLimits(request_limit=3)
        try:
            assert isinstance(agent.run_sync("x", usage_limits=limits).output, Weather)
            ended += 1
        except pydantic_ai.UsageLimitExceeded:  # it has called the tool three times
            pass
    assert seen and ended + len(seen) >= 10
    assert all(city in ("Rome", "Oslo") and days in (1, 2, 3) for city, days in seen)
