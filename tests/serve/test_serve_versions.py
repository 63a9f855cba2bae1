"""A new version beside the old one: switched without a lost request, given a share of the traffic, promoted."""

from __future__ import annotations

import concurrent.futures
import hashlib
import threading
from collections import Counter
from pathlib import Path

import pytest

import generation_toys as toys
import serve_toys
from foveate import SamplingParams
from foveate.cli.options import UsageError
from foveate.cli.serve import _canaries, _candidates
from foveate.serve.keys import Key
from foveate.serve.settings import ServeSettings

ADMIN = Key("admin", hashlib.sha256(b"admin-key").digest(), admin=True)
ASKED = {
    "prompt": toys.prompts(1, 9, 9)[0],
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
    "return_token_ids": True,
}


def other(folder):
    """The toy with other weights."""
    llm = serve_toys.make_llm(folder)
    exact = llm.engine.model.logits
    llm.engine.model.logits = lambda hidden: exact(hidden).flip(-1)
    return llm


def broken():
    raise ValueError("the file is damaged")


@pytest.fixture
def versioned(folder):
    load = {"toy": lambda: serve_toys.make_llm(folder), "new": lambda: other(folder), "bad": broken}
    options = {"models": {"toy": "toy"}, "api_keys": ("plain-key-1", ADMIN)}
    with serve_toys.serving(load, **options) as running:
        yield running


@pytest.fixture(scope="module")
def expected(folder):
    """By version."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    made = {"old": serve_toys.make_llm(folder), "new": other(folder)}
    return {name: llm.generate([ASKED["prompt"]], params)[0].outputs[0].token_ids for name, llm in made.items()}


def admin(running, route: str, /, **body):
    return running.client.post(running.url + route, json=body, headers={"authorization": "Bearer admin-key"})


def ask(running, **more):
    found = running.post("/v1/completions", **ASKED, **more)
    assert found.status_code == 200, found.text
    return found.json()["model"], found.json()["choices"][0]["token_ids"]


def test_a_reload_loses_no_request(versioned, expected):
    """Under load: those that run while it switches end as they began, later ones are the new version's."""
    stop, let, answers, old = threading.Event(), threading.Event(), [], versioned.state.models["toy"]
    step, hold = versioned.engine.step, threading.Event()

    def held():
        assert not hold.is_set() or let.wait(60)
        return step()

    def client():
        while not stop.is_set():
            answers.append(ask(versioned)[1])

    versioned.engine.step = held
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        try:
            clients = [pool.submit(client) for _ in range(4)]
            versioned.wait(lambda: len(answers) > 8, 60)
            hold.set()
            versioned.wait(lambda: old.users == 4, 60)
            found = admin(versioned, "/v1/reload_model", model="toy", path="new")
            assert found.status_code == 200, found.text
            assert versioned.state.models["toy"] is not old and old.users == 4
            assert ask(versioned) == ("toy", expected["new"])
            before = len(answers)
            let.set()
            versioned.wait(lambda: len(answers) > before + 12, 60)
        finally:
            stop.set()
            let.set()
    for future in clients:
        future.result(60)
    assert all(answer == expected["old"] for answer in answers[: before + 1])
    assert answers[-1] == expected["new"] and all(answer in expected.values() for answer in answers)
    versioned.wait(lambda: old.worker is None, 60)
    assert versioned.metric("foveate:model_ready", model_name="toy") == 1


def test_what_cannot_be_loaded_changes_nothing(versioned, expected):
    for route in ("/v1/reload_model", "/v1/set_candidate"):
        found = admin(versioned, route, model="toy", path="bad", **({"share": 1} if "set" in route else {}))
        assert found.status_code == 400 and "the file is damaged" in found.json()["error"]["message"]
    assert ask(versioned) == ("toy", expected["old"]) and list(versioned.state.models) == ["toy"]
    assert versioned.error(403, "/v1/reload_model", model="toy")["code"] == "not_admin"
    assert admin(versioned, "/v1/promote_candidate", model="toy").status_code == 400
    assert admin(versioned, "/v1/set_candidate", model="toy", share=0.5).status_code == 400
    assert admin(versioned, "/v1/reload_model", model="x").status_code == 404


def test_one_change_at_a_time(folder):
    let = threading.Event()

    def slow():
        assert let.wait(60)
        return serve_toys.make_llm(folder)

    load = {"toy": lambda: serve_toys.make_llm(folder), "slow": slow}
    with (
        serve_toys.serving(load, models={"toy": "toy"}, api_keys=(ADMIN, "plain-key-1")) as running,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(admin, running, "/v1/reload_model", model="toy", path="slow")
        try:
            running.wait(running.state.versions._changing.locked, 60)
            assert admin(running, "/v1/reload_model", model="toy", path="slow").status_code == 409
        finally:
            let.set()
        assert first.result(60).status_code == 200


def test_a_candidate_gets_its_share_and_is_promoted(versioned, expected):
    assert admin(versioned, "/v1/set_candidate", model="toy", path="new", share=0.25).status_code == 200
    by_model = Counter()
    for _ in range(20):
        model, tokens = ask(versioned)
        by_model[model] += 1
        assert tokens == expected["new" if model == "toy@candidate" else "old"]
    assert by_model == {"toy": 15, "toy@candidate": 5}
    for model, count in by_model.items():
        label = {"model_name": model, "finished_reason": "length"}
        assert versioned.metric("vllm:request_success_total", **label) == count
    assert ask(versioned, model="toy@candidate")[1] == expected["new"]
    assert admin(versioned, "/v1/set_candidate", model="toy", share=0).status_code == 200
    assert {ask(versioned)[0] for _ in range(5)} == {"toy"}
    assert admin(versioned, "/v1/promote_candidate", model="toy").status_code == 200
    assert ask(versioned) == ("toy", expected["new"]) and list(versioned.state.models) == ["toy"]


def test_a_candidate_is_removed(versioned, expected):
    assert admin(versioned, "/v1/remove_candidate", model="toy").status_code == 400
    assert admin(versioned, "/v1/set_candidate", model="toy", path="new", share=1).status_code == 200
    candidate = versioned.state.models["toy@candidate"]
    steps = serve_toys.Steps(versioned, candidate.worker.engine)
    steps.hold_when(lambda: candidate.worker.engine.has_work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, versioned)
        steps.wait_held()
        assert versioned.error(403, "/v1/remove_candidate", model="toy")["code"] == "not_admin"
        removed = admin(versioned, "/v1/remove_candidate", model="toy")
        assert removed.json() == {"removed": "toy@candidate"}
        assert ask(versioned) == ("toy", expected["old"]) and list(versioned.state.models) == ["toy"]
        steps.run()
        assert running.result(60) == ("toy@candidate", expected["new"])  # it ends on what it began with
    versioned.wait(lambda: candidate.worker is None, 60)
    assert admin(versioned, "/v1/promote_candidate", model="toy").status_code == 400
    assert versioned.error(404, model="toy@candidate", prompt="x")["code"] == "model_not_found"
    assert admin(versioned, "/v1/set_candidate", model="toy", path="new", share=0.5).status_code == 200  # another one


def test_a_candidate_from_the_start(folder, expected):
    load = {"toy": lambda: serve_toys.make_llm(folder), "new": lambda: other(folder)}
    with serve_toys.serving(load, models={"toy": "toy"}, candidates={"toy": ("new", 0.5)}) as running:
        assert [ask(running) for _ in range(4)] == [("toy", expected["old"]), ("toy@candidate", expected["new"])] * 2


def test_on_the_command_line():
    assert _candidates(["chat=./new:5%"]) == {"chat": ("./new", 0.05)}
    for wrong in ("chat=./new", "./new:5%", "chat=./new:x%", "chat=./new:5"):
        with pytest.raises(UsageError, match="NAME=PATH:N%"):
            _candidates([wrong])
    assert _canaries(["golden.jsonl", "chat=./new:5%"]) == (Path("golden.jsonl"), ["chat=./new:5%"])
    assert _canaries([]) == (None, [])
    with pytest.raises(UsageError, match="2 files"):
        _canaries(["a", "b"])
    with pytest.raises(ValueError, match="none of the models"):
        ServeSettings(models={"a": "a"}, candidates={"b": ("c", 0.1)})
    with pytest.raises(ValueError, match="0% to 100%"):
        ServeSettings(models={"a": "a"}, candidates={"a": ("c", 1.5)})
