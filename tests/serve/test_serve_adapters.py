"""Adapters beside their base: chosen by name, in the same batches, loaded and unloaded while the server runs."""

from __future__ import annotations

import concurrent.futures
import hashlib

import pytest

import generation_toys as toys
import serve_toys
from foveate.serve.keys import Key

PROMPTS = toys.prompts(6, 5, 20)
ADMIN = Key("admin", hashlib.sha256(b"admin-key").digest(), admin=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: toys.adapter(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate("abc", 1)}


@pytest.fixture(scope="module")
def adapted(folder, folders):
    keys = ("plain-key-1", ADMIN)
    load = {"toy": lambda: serve_toys.make_llm(folder)}
    with serve_toys.serving(load, api_keys=keys, adapters={name: folders[name] for name in "ab"}) as running:
        yield running


@pytest.fixture(scope="module")
def expected(folder, folders):
    """Tokens by model and prompt, from an LLM in process."""
    llm = serve_toys.make_llm(folder)
    for name, path in folders.items():
        llm.load_adapter(name, path)
    params = serve_toys.foveate.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    return {
        name: [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, adapter=adapter)]
        for name, adapter in {"toy": None, "a": "a", "b": "b", "c": "c"}.items()
    }


def tokens(running, model: str, prompt: list[int]) -> list[int]:
    body = {
        "model": model,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 8,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    found = running.post("/v1/completions", **body)
    assert found.status_code == 200 and found.json()["model"] == model, found.text
    return found.json()["choices"][0]["token_ids"]


def admin(running, path: str, **body):
    return running.client.post(running.url + path, json=body, headers={"authorization": "Bearer admin-key"})


def test_each_request_gets_its_own(adapted, expected):
    listed = {entry["id"]: entry["parent"] for entry in adapted.get("/v1/models").json()["data"]}
    assert listed == {"toy": None, "a": "toy", "b": "toy"}
    asked = [(name, i) for i in range(len(PROMPTS)) for name in ("toy", "a", "b")]
    before = {name: adapted.metric("vllm:generation_tokens_total", model_name=name) for name in ("toy", "a", "b")}
    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda one: tokens(adapted, one[0], PROMPTS[one[1]]), asked))
    assert found == [expected[name][i] for name, i in asked]
    for name, count in before.items():
        assert adapted.metric("vllm:generation_tokens_total", model_name=name) == count + 8 * len(PROMPTS)
    adapted.wait(adapted.idle)


def test_loaded_and_unloaded_while_others_run(adapted, folders, expected):
    assert adapted.error(404, model="c", prompt="x")["code"] == "model_not_found"
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(tokens, adapted, "a", PROMPTS[i % 6]) for i in range(12)]
        found = admin(adapted, "/v1/load_lora_adapter", lora_name="c", lora_path=str(folders["c"]))
        assert found.status_code == 200, found.text
        assert tokens(adapted, "c", PROMPTS[0]) == expected["c"][0]
        assert [future.result(60) for future in running] == [expected["a"][i % 6] for i in range(12)]
    assert adapted.metric("vllm:request_success_total", model_name="c", finished_reason="length") == 1
    assert admin(adapted, "/v1/unload_lora_adapter", lora_name="c").status_code == 200
    assert adapted.error(404, model="c", prompt="x")["code"] == "model_not_found"
    assert adapted.get("/ready").status_code == 200


@pytest.mark.parametrize(
    "path, body, status, sentence",
    [
        ("/v1/load_lora_adapter", {"lora_name": "d", "lora_path": "/nowhere"}, 400, "has no adapter"),
        ("/v1/load_lora_adapter", {"lora_name": "toy", "lora_path": "x"}, 400, "the name of a model"),
        ("/v1/load_lora_adapter", {"lora_name": "d", "lora_path": "x", "base_model_name": "e"}, 404, "no model 'e'"),
        ("/v1/unload_lora_adapter", {"lora_name": "toy"}, 400, "not an adapter"),
        ("/v1/unload_lora_adapter", {"lora_name": "d"}, 404, "no model 'd'"),
    ],
)
def test_what_is_refused(adapted, path, body, status, sentence):
    found = admin(adapted, path, **body)
    assert found.status_code == status and sentence in found.json()["error"]["message"]
    assert adapted.error(403, path, **body)["code"] == "not_admin"


def test_an_adapter_that_cannot_be_loaded_at_the_start(folder, tmp_path):
    load = {"toy": lambda: serve_toys.make_llm(folder)}
    with serve_toys.serving(load, ready=False, adapters={"d": tmp_path}) as running:
        running.wait(lambda: running.server.should_exit, 60)
        assert running.server.failed and "has no adapter" in running.state.models["d"].error
