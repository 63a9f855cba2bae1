"""The Ray Serve application on a local Ray, with two replicas of the toy model: the same answers, prefixes that stay together, a replica
that is killed under load."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

import client_toys
import generation_toys as toys

ray = client_toys.package("ray")
for name in ("ray.serve", "ray.serve.config", "ray.serve.request_router"):
    client_toys.package(name)
from foveate.integrations import ray_serve  # noqa: E402
from foveate.integrations.ray_serve.ingress import prefix_of  # noqa: E402
from foveate.integrations.ray_serve.prefix_router import PrefixTable  # noqa: E402
from foveate.serve import ServeSettings  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
httpx = client_toys.package("httpx2")
GREEDY = {"model": "toy", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toys.folder(tmp_path_factory.mktemp("model"), positions=2048)


@pytest.fixture(scope="module")
def url(folder):
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        num_cpus=4, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False, logging_level="ERROR"
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        settings = ServeSettings(
            models={"toy": str(folder)}, options={"num_pages": 1024, "page_size": 4, "progress": False}
        )
        made = ray_serve.application(settings, replicas=2, actor_options={"num_cpus": 0.5})
        serve.run(made, name="foveate", route_prefix="/")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as made:
        yield made


@pytest.fixture(scope="module")
def expected(folder):
    """Of a prompt, what the model writes in process."""
    import foveate

    llm = foveate.LLM(folder, num_pages=1024, page_size=4, progress=False)
    return lambda prompt, tokens: (
        llm.generate([prompt], foveate.SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens))[0]
        .outputs[0]
        .text
    )


def test_answers_and_errors(client, expected):
    found = client.post("/v1/completions", json={**GREEDY, "prompt": "the quick", "max_tokens": 12})
    assert found.status_code == 200 and found.json()["choices"][0]["text"] == expected("the quick", 12)
    assert found.headers["x-foveate-replica"] and found.headers["x-request-id"]
    assert client.get("/v1/models").json()["data"][0]["id"] == "toy"
    refused = client.post("/v1/completions", json={"prompt": "x", "unheard_of": 1})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "unheard_of"
    large = client.post("/v1/completions", content=b"x" * (4 * 2**20 + 1))
    assert large.status_code == 413 and large.json()["error"]["code"] == "body_too_large"


def stream(client, prompt: str, tokens: int) -> tuple[str, dict | None, str]:
    """(text, the error that ended it, the replica)"""
    text, error = "", None
    asked = {**GREEDY, "prompt": prompt, "max_tokens": tokens, "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as response:
        if response.status_code != 200:
            return "", json.loads(response.read())["error"], ""
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                error = event.get("error", error)
                text += "".join(choice["text"] for choice in event.get("choices", ()))
        assert line == "" or line == "data: [DONE]"
        return text, error, response.headers["x-foveate-replica"]


def test_a_stream(client, expected):
    assert stream(client, "naïve", 20)[:2] == (expected("naïve", 20), None)


def test_beginnings_stay_together(client):
    """Six conversations of three turns: each turn goes where the first one went."""
    homes = {}
    for turn in range(3):
        for number in range(6):
            prompt = f"{number} " + "the quick brown fox " * (6 + turn)
            replica = stream(client, prompt, 2)[2]
            assert homes.setdefault(number, replica) == replica


def test_a_client_that_leaves(client):
    """Its replica aborts the request."""
    asked = {**GREEDY, "prompt": "left", "max_tokens": 1500, "stream": True}
    with client.stream("POST", "/v1/completions", json=asked) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        counts = [client.get("/metrics").text for _ in range(6)]  # of either replica
        if any('vllm:request_success_total{finished_reason="abort",model_name="toy"} 1.0' in text for text in counts):
            return
    raise AssertionError("no replica has aborted it")


def test_a_replica_that_dies_under_load(client, url, expected):
    """Whole answers all come; of the streams, only those of the dead replica end, and say so."""
    tokens, results, lock = 120, [], threading.Lock()
    prompts = [f"{number} the lazy dog" for number in range(10)]
    wanted = {prompt: expected(prompt, tokens) for prompt in prompts}
    killed = threading.Event()

    def ask(number: int) -> None:
        prompt = prompts[number % len(prompts)]
        with httpx.Client(base_url=url, timeout=300, trust_env=False) as own:
            for round_ in range(4):
                if number % 2:
                    found = stream(own, prompt, tokens)
                else:
                    answer = own.post("/v1/completions", json={**GREEDY, "prompt": prompt, "max_tokens": tokens})
                    body = answer.json()
                    text = body["choices"][0]["text"] if answer.status_code == 200 else ""
                    found = (text, body.get("error"), answer.headers.get("x-foveate-replica", ""))
                with lock:
                    results.append((prompt, number % 2 == 1, *found))
                if round_ == 1:
                    killed.wait(120)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    victim = stream(client, "who is there", 1)[2]
    name = f"SERVE_REPLICA::foveate#Replica#{victim}"
    while not results:
        time.sleep(0.01)
    ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
    killed.set()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert len(results) == 32
    for prompt, streamed, text, error, replica in results:
        if error is None:
            assert text == wanted[prompt]
        else:
            assert (
                streamed and replica in (victim, "") and error["code"] == "replica_lost" and "again" in error["message"]
            )
            assert wanted[prompt].startswith(text)
    assert sum(error is None for *_, error, _ in results) >= 16
    deadline = time.monotonic() + 300
    seen = set()
    while len(seen) < 2 and time.monotonic() < deadline:  # Ray has put another one in its place
        seen.add(stream(client, f"{time.monotonic()}", 1)[2])
    assert len(seen) == 2 and victim not in seen


def test_the_table_of_beginnings():
    table, shared = PrefixTable(most=6), "a" * 128
    assert table.best(shared, [1, 2]) == set()
    table.record(shared + "b" * 64, 1)
    table.record(shared + "c" * 64, 2)
    assert table.best(shared, [1, 2]) == {1, 2} and table.best(shared + "b" * 64, [1, 2]) == {1}
    assert table.best(shared + "b" * 64, [2]) == {2} and table.best("a" * 63, [1, 2]) == set()
    table.forget(1)
    assert table.best(shared, [1, 2]) == {2}
    table.record("d" * 64 * 6, 1)
    assert table.best(shared, [1, 2]) == set() and table.best("d" * 64, [1]) == {1}


def test_what_the_router_looks_at():
    assert prefix_of(b'{"prompt": "x"}') == "x" and prefix_of(b'{"prompt": [5, 6]}') == "5\n6"
    chat = {
        "messages": [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    }
    assert prefix_of(json.dumps(chat).encode()) == "systembe\nuserhi"
    assert prefix_of(b"{") == prefix_of(b"[]") == prefix_of(b"{}") == prefix_of(b"null") == ""


def test_what_cannot_be():
    settings = ServeSettings(models={"toy": "x"})
    with pytest.raises(ValueError, match="least"):
        ray_serve.application(settings, replicas=(3, 2))
    with pytest.raises(ValueError, match="tries"):
        ray_serve.application(settings, tries=0)
