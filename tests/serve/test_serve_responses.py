"""/v1/responses with OpenAI's own client: the text is the chat's, a stream's events build what the whole answer has."""

from __future__ import annotations

import json
import threading

import pytest

import serve_toys

openai = pytest.importorskip("openai")
FLAT = {"type": "function", **serve_toys.TOOL["function"]}


@pytest.fixture(scope="module")
def client(tooled):
    import httpx2

    with openai.OpenAI(
        base_url=tooled.url + "/v1", api_key="unused", max_retries=0, http_client=httpx2.Client(trust_env=False)
    ) as made:
        yield made


def test_the_text_is_the_chats(client):
    found = client.responses.create(
        model="toy",
        instructions="be quick",
        input="naïve",
        max_output_tokens=12,
        temperature=0.5,
        extra_body={"seed": 3},
    )
    messages = [{"role": "system", "content": "be quick"}, {"role": "user", "content": "naïve"}]
    chat = client.chat.completions.create(model="toy", messages=messages, max_tokens=12, temperature=0.5, seed=3)
    assert found.output_text == chat.choices[0].message.content and found.temperature == 0.5
    assert found.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")
    assert (found.incomplete_details is not None) == (found.status == "incomplete")
    assert found.usage.input_tokens == chat.usage.prompt_tokens and found.usage.total_tokens == chat.usage.total_tokens


def test_an_answer_goes_back_in_the_next_turn(client):
    """As objects of the client and as plain text, the conversation is the same."""
    asked = {"model": "toy", "max_output_tokens": 8, "extra_body": {"seed": 1, "ignore_eos": True}}
    first = client.responses.create(input="naïve", **asked)
    said = [{"role": "user", "content": [{"type": "input_text", "text": "naïve"}]}]
    by_object = client.responses.create(input=[*said, *first.output, {"role": "user", "content": "go on"}], **asked)
    plain = [*said, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "go on"}]
    by_text = client.responses.create(input=plain, **asked)
    assert by_object.output_text == by_text.output_text and by_object.usage.input_tokens == by_text.usage.input_tokens


@pytest.mark.parametrize("logprobs", [False, True])
def test_events_build_the_whole(client, logprobs):
    asked = {"model": "toy", "input": "naïve café 東京 😀", "max_output_tokens": 30, "extra_body": {"seed": 5}}
    if logprobs:
        asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(stream=True, **asked))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] == f"response.{whole.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(event.delta for event in deltas) == whole.output_text and deltas
    last = events[-1].response
    for response in (whole, last):
        [part] = response.output[0].content
        assert len(part.logprobs) == (response.usage.output_tokens if logprobs else 0)
    assert [part.logprob for part in last.output[0].content[0].logprobs] == [
        part.logprob for part in whole.output[0].content[0].logprobs
    ]
    with client.responses.stream(**asked) as stream:  # the client's own accumulation
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
    assert snapshots[-1] == whole.output_text


def test_calls_of_functions(client):
    asked = {"model": "toy", "input": "x", "tools": [FLAT], "tool_choice": "required", "extra_body": {"seed": 3}}
    whole = client.responses.create(**asked)
    [call] = whole.output
    assert (
        call.type == "function_call" and call.name == "get" and json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    )
    events = list(client.responses.create(stream=True, **asked))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert pieces and "".join(pieces) == call.arguments  # one piece where the engine was faster than the reader
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    after = client.responses.create(
        model="toy", input=[{"role": "user", "content": "x"}, call, result], tools=[FLAT], max_output_tokens=2
    )
    assert after.usage.input_tokens > whole.usage.input_tokens


def test_text_of_a_schema(client):
    from pydantic import BaseModel

    class Animal(BaseModel):
        fast: bool
        legs: int

    found = client.responses.parse(
        model="toy",
        input="x",
        text_format=Animal,
        max_output_tokens=60,
        extra_body={"seed": 5, "logit_bias": {"15": 0}},
    )
    assert isinstance(found.output_parsed, Animal)


@pytest.mark.parametrize(
    "changes, param, sentence",
    [
        ({"input": []}, "input", "empty"),
        ({"input": 5}, "input", None),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "text": "x"}]}]},
            "input[0].content",
            "text only",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments", "missing"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{", "call_id": "1"}]}, "input", "not JSON"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "ignores none"),
        ({"store": True}, "store", None),
        ({"background": True}, "background", None),
        ({"max_output_tokens": 0}, "max_output_tokens", None),
        ({"temperature": -1}, "temperature", "-1"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", None),
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "schema"),
        ({"top_logprobs": 2}, "top_logprobs", "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning", None),
        ({"input": "fox " * 400}, None, "context"),
    ],
)
def test_what_is_refused(tooled, changes, param, sentence):
    error = tooled.error(400, "/v1/responses", **({"input": "x"} | changes))
    assert param is None or error["param"] == param, error
    assert sentence is None or sentence in error["message"], error


def test_a_failure_within_a_stream_is_an_event(tooled):
    """The client gets an error and a failed response, and the stream ends."""
    step, steps, begun = tooled.engine.step, [], threading.Event()

    def failing():
        steps.append(1)
        if len(steps) > 3:
            assert begun.wait(60)
            raise RuntimeError("broken")
        return step()

    tooled.engine.step = failing
    try:
        body = {"input": "x", "stream": True, "max_output_tokens": 50, "ignore_eos": True}
        with tooled.client.stream("POST", tooled.url + "/v1/responses", json=body) as response:
            lines = response.iter_lines()
            found = [next(lines)]
            begun.set()
            found += lines
    finally:
        begun.set()
        tooled.engine.step = step
    events = [json.loads(line[6:]) for line in found if line.startswith("data: ")]
    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1]["response"]["status"] == "failed" and "broken" not in "".join(found)
    tooled.wait(tooled.idle)
