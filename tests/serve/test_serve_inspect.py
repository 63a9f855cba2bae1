"""The field `inspect`: attention rows and logit lens of the model that answered, its bounds, and what other requests notice of it."""

from __future__ import annotations

import itertools
import re
import threading

import pytest
import torch

import generation_toys as toys
import serve_toys
from foveate.inspect import Inspector
from foveate.serve import inspection

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = {"rows": [-1, 0], "attention": {"layers": [1], "heads": [0, 3]}, "logit_lens": {"top": 2}}


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    adapters = {"adapted": toys.adapter(tmp_path_factory.mktemp("adapter"), 1)}
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, adapters=adapters) as running:
        yield running


def expected(server, data):
    inspector = Inspector(next(iter(server.state.models.values())).llm)
    return inspector.inspect(data["token_ids"], rows=[-1, 0], layers=[1], heads=[0, 3], lens_top=2, choices=False)


def check(server, data, prompt, reply):
    assert data["token_ids"] == [*prompt, *reply] and data["rows"] == [len(data["token_ids"]) - 1, 0]
    wanted = expected(server, data)
    torch.testing.assert_close(torch.tensor(data["attention"]["weights"]), wanted.attention, rtol=1e-3, atol=1e-5)
    assert data["attention"]["layers"] == [1] and data["attention"]["heads"] == [0, 3]
    assert data["logit_lens"]["ids"] == wanted.lens.ids.tolist() and data["logit_lens"]["texts"] == wanted.lens.texts


def test_completions(server, monkeypatch):
    monkeypatch.setattr(inspection, "_CHUNK", 3)  # so that the pass takes several steps of the engine
    body = {"prompt": "the quick brown fox", "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    plain = server.post("/v1/completions", **body).json()
    found = server.post("/v1/completions", **body, inspect=ASKED).json()
    assert "inspect" not in plain
    [choice] = found["choices"]
    assert choice["text"] == plain["choices"][0]["text"]
    check(server, found["inspect"], choice["prompt_token_ids"], choice["token_ids"])


def test_the_lens_is_that_of_the_adapter_that_answered(server):
    """After the last layer, the token before the last one of a greedy reply reads as the last one."""
    rows = {"rows": [-2], "logit_lens": {"top": 1}}
    body = {
        "prompt": "the quick brown fox",
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    lenses = []
    for model in ("toy", "adapted"):
        found = server.post("/v1/completions", **body, model=model, inspect=rows).json()
        lenses.append(found["inspect"]["logit_lens"])
        assert lenses[-1]["ids"][-1] == [[found["choices"][0]["token_ids"][-1]]]
    assert lenses[0]["probabilities"] != lenses[1]["probabilities"]


def test_chat_and_streams(server):
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        "temperature": 0,
        "return_token_ids": True,
    }
    found = server.post("/v1/chat/completions", **body, inspect=ASKED).json()
    check(server, found["inspect"], found["prompt_token_ids"], found["choices"][0]["token_ids"])
    for path, given in (("/v1/chat/completions", body), ("/v1/completions", {"prompt": "the", "max_tokens": 3})):
        events = server.events(path, **given, inspect=ASKED, stream_options={"include_usage": True})
        with_it = [event for event in events if "inspect" in event]
        assert len(with_it) == 1 and with_it[0]["choices"] == [] and events[-1]["usage"]
        assert events.index(with_it[0]) == len(events) - 2
        assert with_it[0]["inspect"]["logit_lens"]["ids"]


def test_others_run_between_its_chunks(server, monkeypatch):
    """While another request runs, the engine makes a step between any two of the inspection's."""
    monkeypatch.setattr(inspection, "_CHUNK", 2)
    seen, done = [], threading.Event()
    real, engine_step = inspection.Pass.step, server.engine.step

    def step(self):
        seen.append(("inspection", server.engine.has_work, threading.current_thread().name))
        return real(self)

    def slow():
        seen.append(("engine", True, threading.current_thread().name))
        done.wait(0.05)  # slow enough for the inspection to run beside it, as long as it does
        return engine_step()

    monkeypatch.setattr(inspection.Pass, "step", step)
    monkeypatch.setattr(server.engine, "step", slow)
    other = threading.Thread(
        target=server.post, args=("/v1/completions",), kwargs={"prompt": "a", "max_tokens": 150, "ignore_eos": True}
    )
    other.start()
    server.wait(lambda: server.engine.has_work, 60)
    found = server.post("/v1/completions", prompt="the quick brown fox", max_tokens=1, inspect=ASKED)
    done.set()
    other.join(60)
    assert found.status_code == 200 and not other.is_alive()
    places = [i for i, (kind, _, _) in enumerate(seen) if kind == "inspection"]
    assert len(places) >= 4 and {name for _, _, name in seen} == {"foveate-engine"}
    busy = [(i, j) for i, j in itertools.pairwise(places) if seen[i][1]]
    assert busy and all(j > i + 1 for i, j in busy)
    server.wait(server.idle, 60)


def test_what_is_refused(server):
    for asked, words in (
        ({}, "inspect asks for nothing; give attention, logit_lens or both"),
        ({"rows": [99], "logit_lens": {}}, "inspect.rows has 99; rows of this prompt of .* tokens go from 0"),
        ({"rows": [0] * 33, "logit_lens": {}}, "inspect.rows has 33 entries; at most 32"),
        ({"attention": {"layers": [7]}}, "layers has 7; there are 2 layers"),
        ({"attention": {"heads": []}}, "heads is empty"),
    ):
        error = server.error(400, prompt="the quick", max_tokens=2, inspect=asked)
        assert error["param"] == "inspect"
        assert re.search(words, error["message"]), error
    for asked in ({"logit_lens": {"top": 21}}, {"layers": [1]}, {"rows": [], "logit_lens": {}}, {"rows": "last"}, 3):
        assert server.error(400, prompt="the", max_tokens=2, inspect=asked)["param"]
    several = {"prompt": ["the", "a"], "max_tokens": 2, "inspect": {"logit_lens": {}}}
    assert "looks at one reply, and this request asks for 2" in server.error(400, **several)["message"]
    two = server.error(400, prompt="the", n=2, max_tokens=2, inspect={"logit_lens": {}})
    assert "send one prompt with n=1" in two["message"]


def test_its_size_is_bounded(server, monkeypatch):
    monkeypatch.setattr(inspection, "MOST_WEIGHTS", 16)
    error = server.error(400, prompt="the quick", max_tokens=2, inspect={"attention": {}})
    assert "numbers, more than 16; choose fewer layers, heads or rows" in error["message"]
    monkeypatch.setattr(inspection, "MOST_TOKENS", 3)
    error = server.error(400, prompt="the quick", max_tokens=9, inspect={"logit_lens": {}})
    assert "inspect takes up to 3 tokens of prompt and reply" in error["message"]
    server.wait(server.idle)
