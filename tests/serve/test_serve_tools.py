"""Calls of tools: the same whole as in pieces, wherever the text is cut; and calls that are required always parse."""

from __future__ import annotations

import json
import random

import pytest

import serve_toys
from foveate.serve.protocol import Tool
from foveate.serve.tools import ToolReader, call_schema, writes_tags

CALL = '<tool_call>\n{"name": "get", "arguments": {"city": "Pa\\"}ris", "n": [1, {"a": "}"}]}}\n</tool_call>'
PUT = {"type": "function", "function": {"name": "put"}}


def read(text: str, tags: bool, cuts: list[int]) -> tuple[str, list[tuple[str, str]]]:
    """Content and calls (name, arguments), joined from the deltas."""
    reader, content, calls = ToolReader(tags), "", {}
    for start, end in zip([0, *cuts], [*cuts, len(text)]):
        for delta in reader.push(text[start:end], end == len(text)):
            content += delta.get("content", "")
            for call in delta.get("tool_calls", ()):
                index = call["index"]
                assert (index in calls) != ("id" in call)  # the first delta of a call, and no other, has its id
                if "id" in call:
                    calls[index] = [call["function"]["name"], ""]
                calls[index][1] += call["function"]["arguments"]
    assert [c["arguments"] for c in reader.calls] == [arguments for _, arguments in calls.values()]
    return content, [tuple(call) for call in calls.values()]


ARGUMENTS = '{"city": "Pa\\"}ris", "n": [1, {"a": "}"}]}'


@pytest.mark.parametrize(
    "text, tags, content, calls",
    [
        ("plain text <tool", True, "plain text <tool", []),
        (CALL, True, "", [("get", ARGUMENTS)]),
        (f"I look. {CALL}\n{CALL}", True, "I look. ", [("get", ARGUMENTS)] * 2),
        ('<tool_call>{"arguments": {"a": 1}, "name": "put"}</tool_call>', True, "", [("put", '{"a": 1}')]),
        ("<tool_call>no JSON</tool_call> and text", True, "<tool_call>no JSON</tool_call> and text", []),
        ('<tool_call>{"name": "get", "arguments": {"city": "Ro', True, "", [("get", '{"city": "Ro')]),
        ("<tool_call>", True, "<tool_call>", []),
        ('{"name": "get", "parameters": {"city": "Rome"}}', False, "", [("get", '{"city": "Rome"}')]),
        ('{"name": "get", "arguments": 5}', False, "", [("get", "5")]),
        ('{"other": 1}', False, '{"other": 1}', []),
        ("plain {text}", False, "plain {text}", []),
        ("", True, "", []),
    ],
)
def test_every_way_to_cut(text, tags, content, calls):
    assert read(text, tags, []) == (content, calls)
    for at in range(1, len(text)):
        assert read(text, tags, [at]) == (content, calls), at
    rng = random.Random(1)
    for _ in range(30):
        assert read(text, tags, sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(1, 9))))) == (
            content,
            calls,
        )
    assert read(text, tags, list(range(1, len(text)))) == (content, calls)


def test_arguments_come_early():
    """Not in one piece at the end."""
    reader, first = ToolReader(True), None
    for at, character in enumerate(CALL):
        deltas = list(reader.push(character))
        if first is None and any(d.get("tool_calls", [{}])[0].get("function", {}).get("arguments") for d in deltas):
            first = at
    assert first is not None and first < CALL.index("city")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_required_calls_parse(tooled, choice, stream):
    asked = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [serve_toys.TOOL, PUT][: 1 if choice == "required" else 2],
        "tool_choice": choice,
        "seed": 3,
    }
    found = tooled.post("/v1/chat/completions", **asked).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls" and found["message"]["content"] is None
    [call] = found["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_") and call["function"]["name"] == "get"
    assert json.loads(call["function"]["arguments"])["city"] in ("Rome", "Oslo")
    if stream:
        events = [event["choices"][0] for event in tooled.events("/v1/chat/completions", **asked)]
        deltas = [call for event in events for call in event["delta"].get("tool_calls", ())]
        assert deltas[0]["function"] == {"name": "get", "arguments": ""} and len(deltas) > 1
        assert "".join(d["function"]["arguments"] for d in deltas) == call["function"]["arguments"]
        assert events[-1]["finish_reason"] == "tool_calls"


def test_tools_reach_the_template_unless_none_are_wanted(tooled):
    asked = {
        "messages": [{"role": "user", "content": "x"}],
        "tools": [serve_toys.TOOL],
        "max_tokens": 1,
        "seed": 1,
        "return_token_ids": True,
    }
    tokenizer = tooled.state.models["toy"].llm.tokenizer

    def prompt(**more) -> str:
        return tokenizer.decode(tooled.post("/v1/chat/completions", **asked, **more).json()["prompt_token_ids"], False)

    assert '"get"' in prompt() and '"get"' in prompt(tool_choice="auto") and '"get"' not in prompt(tool_choice="none")
    past = {
        "role": "assistant",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get", "arguments": '{"city": "Rome"}'}}
        ],
    }
    asked["messages"] = [*asked["messages"], past, {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]
    assert "Rome" in prompt()
    past["tool_calls"][0]["function"]["arguments"] = "{"
    assert "not JSON" in tooled.error(400, "/v1/chat/completions", **asked)["message"]
    asked["messages"] = [{"role": "user", "content": "x"}]
    wrong = {"type": "function", "function": {"name": "other"}}
    assert tooled.error(400, "/v1/chat/completions", **asked, tool_choice=wrong)["param"] == "tool_choice"


def test_schemas_of_calls():
    tools = [Tool(**serve_toys.TOOL), Tool(**PUT)]
    assert len(call_schema(tools, None)["anyOf"]) == 2
    assert call_schema(tools, "put")["properties"]["name"] == {"const": "put"}
    shared = {"$defs": {"City": {"enum": ["Rome"]}}, "type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}}
    found = call_schema([Tool(type="function", function={"name": "f", "parameters": shared})], None)
    assert found["$defs"] == shared["$defs"] and "$defs" not in found["properties"]["arguments"]
    assert found["properties"]["arguments"]["additionalProperties"] is False
    assert (
        writes_tags(serve_toys.TOOL_TEMPLATE) is True
        and writes_tags("{{ tools }}") is False
        and writes_tags("{{ messages }}") is None is writes_tags(None)
    )


def test_arguments_have_no_properties_of_their_own():
    """Unless the schema speaks of others; clients such as LangChain leave additionalProperties out."""

    def arguments(**parameters):
        tool = Tool(type="function", function={"name": "f", "parameters": parameters})
        return call_schema([tool], None)["properties"]["arguments"]

    listed = {"properties": {"a": {"type": "object", "properties": {"properties": {"type": "string"}}}}}
    found = arguments(type="object", **listed)
    inner = found["properties"]["a"]
    assert found["additionalProperties"] is inner["additionalProperties"] is False
    assert inner["properties"] == {"properties": {"type": "string"}}
    assert arguments(**listed, additionalProperties=True)["additionalProperties"] is True
    assert "additionalProperties" not in arguments(type="object")
    several = {"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}
    assert arguments(**several) == several
    default = {"properties": {"a": {"default": {"properties": {}}}}}
    assert arguments(**default)["properties"] == default["properties"]
