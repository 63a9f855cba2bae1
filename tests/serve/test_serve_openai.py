"""OpenAI's own client against the server, as programs use it."""

from __future__ import annotations

import importlib
import threading

import pytest

import serve_toys

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(toy):
    import httpx2

    with openai.OpenAI(
        base_url=toy.url + "/v1", api_key="unused", max_retries=0, http_client=httpx2.Client(trust_env=False)
    ) as made:
        yield made


def test_models(client):
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"


def test_completions(client, toy):
    asked = {"prompt": "the quick", "max_tokens": 8, "seed": 1, "temperature": 0.7, "n": 1, "stop": None}
    found = client.completions.create(model="toy", logprobs=2, **asked)
    assert (
        found.choices[0].text == toy.text(**asked)
        and len(found.choices[0].logprobs.tokens) == found.usage.completion_tokens
    )
    pieces = [chunk.choices[0].text for chunk in client.completions.create(model="toy", stream=True, **asked)]
    assert "".join(pieces) == found.choices[0].text


def test_chat(client):
    asked = {"model": "toy", "messages": [{"role": "user", "content": "naïve"}], "max_tokens": 12, "seed": 2}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs.content[0].top_logprobs
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_structured_output(client):
    from pydantic import BaseModel

    class Animal(BaseModel):
        fast: bool
        legs: int

    parsed = client.chat.completions.parse(
        model="toy",
        messages=[{"role": "user", "content": "x"}],
        response_format=Animal,
        seed=5,
        max_tokens=60,
        logit_bias={"15": 0},
    )
    assert isinstance(parsed.choices[0].message.parsed, Animal)


def test_errors_are_its_classes(client):
    with pytest.raises(openai.NotFoundError, match="toy"):
        client.completions.create(model="gpt-3", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model="toy", prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.completions.create(model="toy", prompt=[5] * 1000)
    assert caught.value.code == "context_length_exceeded"


def test_a_stream_that_is_closed(client, toy):
    """The request is aborted, not generated to its end: the engine stands still until the server has noticed."""
    noticed = threading.Event()
    step, steps = toy.engine.step, []

    def waiting():
        steps.append(1)
        assert len(steps) <= 5 or noticed.wait(60)
        return step()

    def aborted():
        return toy.metric("vllm:request_success_total", model_name="toy", finished_reason="abort")

    before, generated = aborted(), toy.metric("vllm:generation_tokens_total", model_name="toy")
    toy.engine.step = waiting
    try:
        stream = client.completions.create(
            model="toy", prompt="x", max_tokens=200, seed=1, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        toy.wait(lambda: toy.state.in_flight == 0, 60)
    finally:
        noticed.set()
        toy.engine.step = step
    toy.wait(toy.idle)
    assert aborted() == before + 1
    assert toy.metric("vllm:generation_tokens_total", model_name="toy") - generated < 200


def test_a_wrong_key(folder):
    import httpx2

    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, api_keys=("right-key",)) as running:
        for key, good in (("right-key", True), ("wrong-key", False)):
            with openai.OpenAI(
                base_url=running.url + "/v1", api_key=key, max_retries=0, http_client=httpx2.Client(trust_env=False)
            ) as made:
                if good:
                    assert made.models.list()
                else:
                    with pytest.raises(openai.AuthenticationError):
                        made.models.list()


def test_the_example_runs(toy, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    importlib.import_module("serve_client").main(
        ["--url", toy.url + "/v1", "--question", "naïve?", "--max-tokens", "40"]
    )
    shown = capsys.readouterr().out
    assert "as JSON: {" in shown and shown.rstrip().endswith("%")
