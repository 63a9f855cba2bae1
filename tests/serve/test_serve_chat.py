"""/v1/chat/completions: the template, streams, log-probabilities, forms of output."""

from __future__ import annotations

import json
import threading

import pytest

from foveate import SamplingParams

MESSAGES = [{"role": "user", "content": "naïve café"}]


def test_reply_and_shapes(toy, llm):
    asked = {"messages": MESSAGES, "max_tokens": 15, "temperature": 0}
    found = toy.post("/v1/chat/completions", **asked, model="toy").json()
    expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=15))
    [choice] = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.outputs[0].text, "refusal": None}
    assert choice["finish_reason"] == expected.outputs[0].finish_reason and choice["logprobs"] is None
    assert found["id"].startswith("chatcmpl-") and found["object"] == "chat.completion"
    assert found["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert found["system_fingerprint"].startswith("fv_")
    parts = [{"role": "user", "content": [{"type": "text", "text": "naïve café"}]}]
    assert toy.post("/v1/chat/completions", **{**asked, "messages": parts}).json()["choices"] == found["choices"]


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_has_the_role_first_and_the_reason_last(toy, n):
    asked = {"messages": MESSAGES, "max_completion_tokens": 25, "seed": 4, "temperature": 1.2, "n": n, "stop": "e"}
    whole = toy.post("/v1/chat/completions", **asked).json()
    events = toy.events("/v1/chat/completions", **asked, stream_options={"include_usage": True})
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert [event["choices"][0]["delta"] for event in events[:n]] == [{"role": "assistant", "content": ""}] * n
    assert (
        events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    )
    for choice in whole["choices"]:
        parts = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]


def test_log_probabilities(toy):
    asked = {"messages": MESSAGES, "max_tokens": 12, "seed": 1, "logprobs": True, "top_logprobs": 3}
    whole = toy.post("/v1/chat/completions", **asked).json()
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == whole["usage"]["completion_tokens"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 3
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert values == sorted(values, reverse=True)
        if not entry["token"].startswith("bytes:"):
            assert bytes(entry["bytes"]).decode() == entry["token"]
    joined = b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "replace")
    assert joined.startswith(whole["choices"][0]["message"]["content"])
    events = toy.events("/v1/chat/completions", **asked)
    streamed = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    assert [entry for part in streamed for entry in part["content"]] == content


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "dog"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}},
        {"guided_json": SCHEMA}, {"structured_outputs": {"json": SCHEMA}}, {"guided_json": json.dumps(SCHEMA)},
    ],
)  # fmt: skip
def test_json_of_a_schema(toy, form):
    found = toy.post("/v1/chat/completions", messages=MESSAGES, seed=1, max_tokens=80, **form)
    assert found.status_code == 200, found.text
    value = json.loads(found.json()["choices"][0]["message"]["content"])
    assert value["name"] in ("fox", "dog") and value["count"] in range(10)


def test_other_forms(toy):
    found = toy.post("/v1/chat/completions", messages=MESSAGES, seed=1, guided_regex="a{3}b").json()
    assert found["choices"][0]["message"]["content"] == "aaab" and found["choices"][0]["finish_reason"] == "stop"
    found = toy.post(
        "/v1/chat/completions", messages=MESSAGES, seed=1, structured_outputs={"choice": ["x+y", "u.v"]}
    ).json()
    assert found["choices"][0]["message"]["content"] in ("x+y", "u.v")
    found = toy.post(
        "/v1/chat/completions", messages=MESSAGES, seed=1, max_tokens=100, response_format={"type": "json_object"}
    ).json()
    text = found["choices"][0]["message"]["content"]
    assert text.startswith("{") and (
        found["choices"][0]["finish_reason"] == "length" or isinstance(json.loads(text), dict)
    )


@pytest.mark.parametrize(
    "form, param",
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}}, "response_format"),
        ({"guided_regex": "("}, "response_format"), ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
        ({"guided_json": {"type": "object"}, "stop": "x"}, "stop"), ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": {"enum": ["x" * 70_000]}}, "guided_json"), ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "text"}, "tool_choice": "auto"}, "tool_choice"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_followed_are_refused(toy, form, param):
    """Never a free text with status 200."""
    error = toy.error(400, "/v1/chat/completions", messages=MESSAGES, **form)
    assert error["param"] in (param, "regex", None), error
    assert toy.text(prompt="x", max_tokens=1, seed=1, ignore_eos=True)


def test_a_grammar_that_takes_for_ever(toy, monkeypatch):
    """It holds up neither other requests nor the event loop."""
    let = threading.Event()
    monkeypatch.setattr("foveate.serve.state._GRAMMAR_SECONDS", 0.2)
    monkeypatch.setattr(toy.engine, "compile", lambda params: let.wait(20))
    try:
        assert "0.2 s" in toy.error(400, "/v1/chat/completions", messages=MESSAGES, guided_regex="a")["message"]
        assert toy.text(prompt="x", max_tokens=1, seed=1, ignore_eos=True)
    finally:
        let.set()


def test_an_empty_schema_ends(toy):
    found = toy.post("/v1/chat/completions", messages=MESSAGES, seed=2, max_tokens=60, guided_json={}).json()
    assert found["choices"][0]["finish_reason"] in ("stop", "length")


def test_what_a_template_refuses_is_a_400(toy):
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = next(iter(toy.state.models.values())).llm.tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        assert "roles must alternate" in toy.error(400, "/v1/chat/completions", messages=MESSAGES)["message"]
        tokenizer.chat_template = None
        assert "no chat template" in toy.error(400, "/v1/chat/completions", messages=MESSAGES)["message"]
    finally:
        tokenizer.chat_template = before


def test_continued_message_and_template_switches(toy, llm):
    messages = [*MESSAGES, {"role": "assistant", "content": "the qui"}]
    asked = {"add_generation_prompt": False, "continue_final_message": True}
    found = toy.post(
        "/v1/chat/completions", messages=messages, temperature=0, max_tokens=4, return_token_ids=True, **asked
    ).json()
    assert found["prompt_token_ids"] == llm.encode_chat(messages, **asked)
    assert (
        toy.error(400, "/v1/chat/completions", messages=messages, chat_template_kwargs={"tools": []})["param"]
        == "chat_template_kwargs"
    )


def test_tokens_of_prompts_and_chats(toy, llm):
    found = toy.post("/tokenize", prompt="naïve 😀", return_token_strs=True).json()
    assert found["tokens"] == llm.encode("naïve 😀") and found["count"] == len(found["tokens"]) == len(
        found["token_strs"]
    )
    assert found["max_model_len"] == llm.max_model_len
    assert toy.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "naïve 😀"}
    assert toy.post("/tokenize", messages=MESSAGES).json()["tokens"] == llm.encode_chat(MESSAGES)
    assert toy.get("/tokenizer_info").json()["eos_token"] == "<eos>"
    assert toy.error(400, "/detokenize", tokens=[5, 99999])["param"] == "tokens"
    assert toy.error(400, "/tokenize")["param"] == "prompt"
