"""foveate serve --guard: prompts that are blocked or redacted, answers out of which nothing forbidden comes, counts and the audit log."""

from __future__ import annotations

import json

import pytest

import serve_toys
from foveate import SamplingParams

pytest.importorskip("regex", reason="regex is not installed")
MESSAGES = [{"role": "user", "content": "naïve café"}]
ASKED = {"messages": MESSAGES, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def reply(llm):
    """What the model says without a guard; the rules are made of it."""
    text = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24)).outputs[0].text
    assert len(text) > 8
    return text


@pytest.fixture(scope="module")
def guarded(folder, reply, tmp_path_factory):
    """redacted: "card" in prompts. blocked: "forbidden" in prompts, and the middle of the reply in answers."""
    place = tmp_path_factory.mktemp("policy")
    policy = {
        "rules": [
            {"name": "no", "kind": "words", "words": ["forbidden"], "on": ["input"]},
            {"name": "cards", "kind": "personal", "kinds": ["card"], "action": "redact"},
            {"name": "middle", "kind": "pattern", "patterns": [regex_of(reply[3:8])], "on": ["output"]},
            {"name": "seen", "kind": "words", "words": ["café"], "action": "flag", "on": ["input"]},
        ],
        "message": "[blocked]", "audit": "audit.jsonl",
    }  # fmt: skip
    (place / "policy.json").write_text(json.dumps(policy))
    loaders = {"toy": lambda: serve_toys.make_llm(folder)}
    with serve_toys.serving(loaders, guard=place / "policy.json") as running:
        running.audit = place / "audit.jsonl"
        yield running


def regex_of(text: str) -> str:
    return "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else c for c in text)


def test_a_prompt_is_blocked_with_a_sentence(guarded):
    for path, body, param in [
        ("/v1/chat/completions", {"messages": [*MESSAGES, {"role": "user", "content": "a Forbidden thing"}]}, "messages[1]"),
        ("/v1/completions", {"prompt": ["fine", "a forbidden thing"]}, "prompt"),
    ]:  # fmt: skip
        error = guarded.error(400, path, **body)
        assert error["code"] == "content_filter" and error["param"] == param and "the rule no" in error["message"]
        assert "[blocked]" in error["message"] and "thing" not in error["message"]


def test_token_ids_are_read_as_their_text(guarded, llm):
    error = guarded.error(400, "/v1/completions", prompt=llm.encode("a forbidden thing"))
    assert error["code"] == "content_filter"


def test_a_redacted_prompt_is_what_the_model_sees(guarded, llm):
    found = guarded.post("/v1/completions", prompt="pay 4111 1111 1111 1111 now", max_tokens=2, temperature=0).json()
    assert found["usage"]["prompt_tokens"] == len(llm.encode("pay <CARD> now"))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_an_answer_is_cut_where_a_rule_blocks(guarded, llm, reply, path):
    cut = reply[:3] + "[blocked]"
    if path == "/v1/chat/completions":
        [choice] = guarded.post(path, **ASKED).json()["choices"]
        assert choice["message"]["content"] == cut and choice["finish_reason"] == "content_filter"
        events = guarded.events(path, **ASKED)
        texts = [event["choices"][0]["delta"].get("content", "") for event in events]
        assert "".join(texts) == cut and events[-1]["choices"][0]["finish_reason"] == "content_filter"
    elif path == "/v1/completions":
        asked = {"prompt": llm.encode_chat(MESSAGES), "max_tokens": 24, "temperature": 0}
        events = guarded.events(path, **asked)
        assert "".join(event["choices"][0]["text"] for event in events) == cut
        assert events[-1]["choices"][0]["finish_reason"] == "content_filter"
    else:
        found = guarded.post(path, input=MESSAGES[0]["content"], max_output_tokens=24, temperature=0).json()
        assert found["status"] == "incomplete" and found["incomplete_details"] == {"reason": "content_filter"}
        assert found["output"][0]["content"][0]["text"] == cut
    guarded.wait(guarded.idle)  # the engine goes on with nothing


def test_fields_that_show_tokens_are_refused(guarded):
    for field in ({"logprobs": True}, {"return_token_ids": True}):
        error = guarded.error(400, "/v1/chat/completions", **ASKED, **field)
        assert error["param"] == next(iter(field)) and "shows tokens" in error["message"]


def test_counts_and_audit(guarded):
    labels = {"side": "input", "rule": "no", "action": "block"}
    before = guarded.metric("foveate:guard_findings_total", **labels)
    lines = len(guarded.audit.read_text().splitlines()) if guarded.audit.exists() else 0
    guarded.error(400, "/v1/completions", prompt="forbidden")
    assert guarded.metric("foveate:guard_findings_total", **labels) == before + 1
    [line] = map(json.loads, guarded.audit.read_text().splitlines()[lines:])
    assert line["rule"] == "no" and line["request"].startswith("cmpl-") and "text" not in line
    assert guarded.metric("foveate:guard_findings_total", side="output", rule="cards", action="redact") == 0


def test_without_rules_for_the_output_nothing_changes(folder, llm, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"rules": [{"kind": "injection"}]}))
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, guard=tmp_path / "p.json") as running:
        found = running.post("/v1/chat/completions", **ASKED, logprobs=True).json()["choices"][0]
        expected = llm.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=24)).outputs[0]
        assert found["message"]["content"] == expected.text and found["logprobs"] is not None
