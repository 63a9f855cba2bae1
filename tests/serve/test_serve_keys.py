"""Keys: their file, what each may use in a minute, which models, and whose turn is next."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import threading

import pytest

import generation_toys as toys
import serve_toys
from foveate.serve.keys import Key, read_keys
from foveate.serve.limits import Bucket, Turns


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def test_files_of_keys(tmp_path):
    file = tmp_path / "keys"
    entry = {
        "name": "team",
        "sha256": digest("third-key").hex(),
        "requests_per_minute": 5,
        "models": ["toy"],
        "priority": 2,
    }
    file.write_text(f"# team\nfirst-key\n\nsecond-key\n{json.dumps(entry)}\n")
    first, second, third = read_keys(file)
    assert (first.digest, second.digest) == (digest("first-key"), digest("second-key")) and first.requests is None
    assert (third.digest, third.name, third.requests.per_minute) == (digest("third-key"), "team", 5)
    assert third.models == {"toy"} and third.priority == 2 and third.tokens is None and not third.admin
    assert "first-key" not in repr(first) and digest("first-key").hex() not in repr(first)


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("# nothing", "holds no key"), ("short", "line 1.*8 characters"), ("{", "line 1"), ('{"sha256": "abc"}', "64 hexadecimal"),
        ('{"name": "a"}', "64 hexadecimal"), ('{"sha256": "%s", "limit": 1}', "limit is not known"),
        ('{"sha256": "%s", "requests_per_minute": 0}', "above 0"), ('{"sha256": "%s", "models": "toy"}', "a list of names"),
        ('{"sha256": "%s", "admin": 1}', "true or false"), ('{"sha256": "%s", "priority": true}', "whole number"),
        ('{"sha256": "%s", "name": "x"}\n{"sha256": "%s", "name": "x"}', "two keys 'x'"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, line, sentence):
    (tmp_path / "keys").write_text(line.replace("%s", "ab" * 32))
    with pytest.raises(ValueError, match=sentence):
        read_keys(tmp_path / "keys")


def test_a_bucket_fills_by_the_minute():
    now = [0.0]
    bucket = Bucket(60, lambda: now[0])
    assert bucket.take(60) == 0 and bucket.take(1) == 1
    now[0] = 0.5
    assert bucket.take(1) == 0.5
    now[0] = 2
    assert bucket.take(2) == 0
    bucket.give(-10)  # more was used than reserved
    assert bucket.take(0) == 10
    now[0] = 1000
    assert bucket.take(61) == 1 and bucket.take(60) == 0  # never more than a minute's


def test_turns_are_fair():
    """In the order of the tags, a key with ten requests gets one between two of another, and those of a key keep their order."""
    turns = Turns()
    many = [turns.tag("many", 10) for _ in range(10)]
    few = [turns.tag("few", 10) for _ in range(2)]
    assert many == sorted(many) and sorted(many + few)[:4] == [0, 0, 10, 10]
    turns.began(50)
    assert turns.tag("late", 10) == 50 and turns.tag("few", 10) == 50 and turns.tag("many", 10) == 100


@pytest.fixture
def keyed(folder):
    """A server on which steps wait for `let`, with one place; keys: a plain one, and some with limits."""
    keys = (
        "plain-key-1",
        Key("few", digest("few-requests"), requests=Bucket(2)),
        Key("small", digest("small-budget"), tokens=Bucket(60)),
        Key("other", digest("other-model"), models=frozenset({"elsewhere"})),
        Key("second", digest("second-class"), priority=5),
        Key("mine", digest("shares-one"), cache="team"),
        Key("yours", digest("shares-two"), cache="team"),
    )
    with serve_toys.serving(
        {"toy": lambda: serve_toys.make_llm(folder, max_batch=1)}, api_keys=keys, max_queue=8
    ) as running:
        yield running


def ask(running, key: str, **body):
    body = {"prompt": "x", "max_tokens": 2, "seed": 1, "ignore_eos": True} | body
    return running.client.post(running.url + "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})


def test_prompts_of_other_keys_are_not_in_the_cache(keyed):
    """Else the time to a first token tells whether somebody has sent a text that begins in the same way."""
    prompt = toys.prompts(1, 40, 40)[0]

    def cached(key: str) -> int:
        usage = ask(keyed, key, prompt=prompt).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached("plain-key-1"), cached("few-requests"), cached("shares-one")] == [0, 0, 0]
    assert (
        cached("plain-key-1") == cached("few-requests") == cached("shares-two") == 36
    )  # full pages of 4, without the last token


def test_requests_a_minute(keyed):
    assert [ask(keyed, "few-requests").status_code for _ in range(3)] == [200, 200, 429]
    found = ask(keyed, "few-requests")
    assert found.json()["error"]["code"] == "rate_limited" and 1 <= int(found.headers["retry-after"]) <= 30
    assert ask(keyed, "plain-key-1").status_code == 200
    assert keyed.metric("vllm:admission_rejections_total", model_name="toy", reason="rate_limited") == 2
    assert keyed.metric("foveate:key_requests_total", key="few") == 2


def test_tokens_a_minute(keyed):
    """What was reserved and not used comes back: ten requests that may take 50 tokens and take 3 fit into 60."""
    error = ask(keyed, "small-budget", max_tokens=100).json()["error"]
    assert error["code"] == "tokens_per_minute" and "60 a minute" in error["message"]
    for _ in range(10):
        found = ask(keyed, "small-budget", max_tokens=40, guided_choice=["a"], ignore_eos=None)
        assert found.status_code == 200, found.text
    used = 10 * found.json()["usage"]["total_tokens"]
    kinds = [keyed.metric("foveate:key_tokens_total", key="small", kind=kind) for kind in ("prompt", "generation")]
    assert sum(kinds) == used < 60
    found = ask(keyed, "small-budget", max_tokens=50)
    assert found.status_code == 429 and 1 <= int(found.headers["retry-after"]) <= 60


def test_models_of_a_key(keyed):
    found = ask(keyed, "other-model")
    assert found.status_code == 403 and found.json()["error"]["code"] == "model_not_allowed"
    listed = keyed.client.get(keyed.url + "/v1/models", headers={"authorization": "Bearer other-model"}).json()
    assert listed["data"] == []


def test_priorities(keyed):
    """In the queue of a busy server the lower number is first; none goes before its key's."""
    error = ask(keyed, "second-class", priority=4).json()["error"]
    assert error["param"] == "priority" and "5" in error["message"]
    assert order(keyed, [("plain-key-1", {"priority": 7}), ("second-class", {}), ("plain-key-1", {})]) == [2, 1, 0]


def test_keys_take_turns(keyed):
    """One that comes after four of another key, of which one more runs, is next: not last, as it would be in the order of arrival."""
    asked = [("plain-key-1", {"priority": 5})] * 4 + [("second-class", {})]
    assert order(keyed, asked) == [4, 0, 1, 2, 3]


def test_a_key_cannot_fill_the_queue(keyed):
    """The queue is 8 places beside the one that runs, of which a key has 4; then another key still gets in."""
    let = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        waiting = held(keyed, let, pool, [("plain-key-1", {})] * 5, [])
        found = ask(keyed, "plain-key-1")
        assert found.status_code == 429 and "of this key" in found.json()["error"]["message"]
        other = pool.submit(ask, keyed, "second-class")
        keyed.wait(lambda: len(keyed.worker._inbox) == 5, 60)
        let.set()
        assert {future.result(60).status_code for future in [*waiting, other]} == {200}


def held(running, let, pool, asked, begun):
    """Futures of requests that came in this order and wait until `let`: the engine stands still in its first step. begun: gets the seeds
    of the others, which are 1, 2, ..., in the order in which they begin."""
    step, scheduler = running.engine.step, running.engine.scheduler

    def waiting():
        assert let.wait(60)
        outputs = step()
        begun.extend(s.request.params.seed for s in scheduler.running if s.request.params.seed not in begun)
        return outputs

    running.engine.step = waiting
    futures = []
    for i, (key, body) in enumerate(asked):
        futures.append(pool.submit(ask, running, key, **(body | {"seed": i})))
        running.wait(lambda: running.engine.has_work and len(running.worker._inbox) == len(futures) - 1, 60)
    return futures


def order(running, asked) -> list[int]:
    """In which order requests begin that wait behind one that runs."""
    let, begun = threading.Event(), []
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = held(running, let, pool, [("plain-key-1", {}), *asked], begun)
        let.set()
        assert {future.result(60).status_code for future in futures} == {200}
    return [seed - 1 for seed in begun if seed > 0]
