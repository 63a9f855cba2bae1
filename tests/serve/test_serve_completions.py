"""/v1/completions: the same text and numbers as LLM gives in process, in OpenAI's shapes."""

from __future__ import annotations

import concurrent.futures

import pytest

import generation_toys as toys
from foveate import SamplingParams

PROMPT = "the quick brown fox"


def test_text_and_usage(toy, llm):
    found = toy.post("/v1/completions", model="toy", prompt=PROMPT, max_tokens=12, temperature=0).json()
    [expected] = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    sample = expected.outputs[0]
    [choice] = found["choices"]
    assert (choice["text"], choice["finish_reason"]) == (sample.text, sample.finish_reason)
    assert choice["index"] == 0 and choice["logprobs"] is None
    assert found["id"].startswith("cmpl-") and found["object"] == "text_completion" and found["model"] == "toy"
    assert isinstance(found["created"], int)
    usage = found["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_token_ids) and usage["completion_tokens"] == len(
        sample.token_ids
    )
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_defaults(toy):
    found = toy.post("/v1/completions", prompt=PROMPT, ignore_eos=True, seed=1).json()
    assert found["usage"]["completion_tokens"] == 16 and found["choices"][0]["finish_reason"] == "length"


def test_prompts_of_every_kind_and_n(toy, llm):
    ids = llm.encode(PROMPT)
    shared = {"max_tokens": 6, "temperature": 0.9, "seed": 3}
    expected = llm.generate([PROMPT, "naïve"], SamplingParams(n=2, **shared))
    texts = [sample.text for output in expected for sample in output.outputs]
    for prompt in ([PROMPT, "naïve"], [ids, llm.encode("naïve")]):
        choices = toy.post("/v1/completions", prompt=prompt, n=2, **shared).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
        assert [choice["text"] for choice in choices] == texts
    assert toy.text(prompt=ids, **shared) == texts[0]
    best = llm.generate(PROMPT, SamplingParams(n=1, best_of=3, **shared))[0].outputs[0].text
    assert toy.text(prompt=PROMPT, best_of=3, **shared) == best


@pytest.mark.parametrize("stops", [None, ["o"], ["zzz", "e "]])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_joins_to_the_text(toy, n, stops):
    asked = {
        "prompt": "naïve café über 東京 😀",
        "max_tokens": 40,
        "temperature": 1.1,
        "seed": 5,
        "n": n,
        "stop": stops,
    }
    whole = toy.post("/v1/completions", **asked).json()
    events = toy.events("/v1/completions", **asked)
    for choice in whole["choices"]:
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert all(stop not in choice["text"] for stop in stops or ())
    assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
    assert all("usage" not in event for event in events)


def test_usage_chunk_only_when_asked(toy):
    asked = {"prompt": PROMPT, "max_tokens": 5, "n": 2, "seed": 1}
    *chunks, last = toy.events("/v1/completions", **asked, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"] == toy.post("/v1/completions", **asked).json()["usage"] | {
        "prompt_tokens_details": last["usage"]["prompt_tokens_details"]
    }
    assert all(chunk["usage"] is None and len(chunk["choices"]) == 1 for chunk in chunks)


def test_echo_has_the_exact_log_probabilities(toy, llm):
    """As evaluations ask: token ids, echo, one token, log-probabilities; the value of a token is in its own map, bit for bit."""
    ids = llm.encode("the lazy dog, again")
    found = toy.post("/v1/completions", prompt=ids, echo=True, max_tokens=1, logprobs=1, temperature=0).json()
    logprobs = found["choices"][0]["logprobs"]
    [expected] = llm.generate([ids], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, logprobs=1))
    wanted = [None, *(entry[token].logprob for token, entry in zip(ids[1:], expected.prompt_logprobs[1:]))]
    assert logprobs["token_logprobs"][:-1] == wanted and len(logprobs["token_logprobs"]) == len(ids) + 1
    assert logprobs["top_logprobs"][0] is None
    for token, value, top in list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"]))[1:]:
        assert top[token] == value and value <= max(top.values())
    text = found["choices"][0]["text"]
    assert text.startswith("the lazy dog, again")
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"]):
        assert token.startswith("bytes:") or text[offset:].startswith(token) or token == "<eos>"


def test_echo_without_new_tokens(toy, llm):
    found = toy.post("/v1/completions", prompt="lazy dog", echo=True, max_tokens=0, logprobs=2).json()
    [choice] = found["choices"]
    assert choice["text"] == "lazy dog" and choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["tokens"]) == len(llm.encode("lazy dog")) == found["usage"]["total_tokens"]
    assert toy.error(400, prompt="x", max_tokens=0)["param"] == "max_tokens"


def test_streamed_logprobs_are_those_of_the_whole(toy):
    asked = {
        "prompt": PROMPT,
        "max_tokens": 20,
        "temperature": 1,
        "seed": 2,
        "logprobs": 3,
        "echo": True,
        "stop": ["lazy"],
    }
    whole = toy.post("/v1/completions", **asked).json()["choices"][0]["logprobs"]
    parts = [event["choices"][0]["logprobs"] for event in toy.events("/v1/completions", **asked)]
    for name, values in whole.items():
        assert [value for part in parts for value in part[name]] == values


def test_token_ids_extension(toy, llm):
    found = toy.post(
        "/v1/completions",
        prompt=PROMPT,
        max_tokens=5,
        temperature=0,
        logprobs=1,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
    ).json()["choices"][0]
    assert found["prompt_token_ids"] == llm.encode(PROMPT)
    assert found["logprobs"]["tokens"] == [f"token_id:{token}" for token in found["token_ids"]]


def test_forbidden_tokens_are_valid_json(toy):
    """Log-probabilities of more tokens than a grammar allows; minus infinity does not occur in JSON."""
    found = toy.post(
        "/v1/completions", prompt=PROMPT, max_tokens=4, logprobs=20, guided_choice=["fox", "dog"], temperature=0
    )
    assert found.status_code == 200 and found.json()["choices"][0]["text"] in ("fox", "dog", "fo", "do", "f", "d")
    assert toy.text(prompt=PROMPT, max_tokens=20, temperature=0, guided_regex="[0-9]{3}").isdigit()


def test_parallel_requests_share_batches_and_do_not_show(toy, llm):
    """48 requests at once give what each gives alone."""
    prompts = toys.prompts(48, low=3, high=30)
    params = [SamplingParams(max_tokens=4 + i % 9, temperature=0.8 if i % 2 else 0, seed=i) for i in range(48)]
    expected = [llm.generate([prompt], p)[0].outputs[0].token_ids for prompt, p in zip(prompts, params)]

    def ask(i: int) -> list[int]:
        p = params[i]
        found = toy.post(
            "/v1/completions",
            prompt=prompts[i],
            max_tokens=p.max_tokens,
            temperature=p.temperature,
            seed=p.seed,
            return_token_ids=True,
        )
        return found.json()["choices"][0]["token_ids"]

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        assert list(pool.map(ask, range(48))) == expected
    toy.wait(toy.idle)


def test_letters_do_not_wait_for_the_character_after_them(toy):
    """A character of several tokens comes whole, and what stands before it comes as soon as it is there."""
    asked = {"prompt": PROMPT, "guided_regex": "a😀b", "max_tokens": 20, "temperature": 0}
    first = set()
    for _ in range(20):  # one piece holds more where the engine was faster than the event loop
        pieces = [event["choices"][0]["text"] for event in toy.events("/v1/completions", **asked)]
        assert "".join(pieces) == "a😀b" and all("\ufffd" not in piece for piece in pieces)
        first.add(pieces[0])
        if "a" in first:
            return
    raise AssertionError(f"no reply began with the letter alone: {first}")


def test_the_model_may_stand_in_the_path(toy):
    """As openai 0.28 writes engine=, for completions and chats."""
    asked = {"prompt": "the quick", "max_tokens": 5, "seed": 1}
    found = toy.post("/v1/engines/toy/completions", **asked)
    assert found.json()["choices"][0]["text"] == toy.text(**asked) and found.json()["model"] == "toy"
    chat = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}
    assert toy.post("/v1/engines/toy/chat/completions", **chat).json()["object"] == "chat.completion"
    assert toy.error(404, "/v1/engines/other/completions", **asked)["code"] == "model_not_found"
    assert toy.error(400, "/v1/engines/toy/completions", model="other", **asked)["param"] == "model"
