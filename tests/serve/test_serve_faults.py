"""Faults: clients that leave, read slowly or send nonsense; engines that raise, freeze or are full."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import socket
import threading
import time

import pytest

import generation_toys as toys
import serve_toys

LONG = {"prompt": "the quick brown fox", "max_tokens": 200, "ignore_eos": True, "seed": 1}


@pytest.fixture
def toy(folder):
    """Two samples at once, prompts in chunks of 8 tokens."""
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder, max_prefill_tokens=8, max_batch=2)}) as running:
        yield running


def connect(running, body: dict) -> socket.socket:
    """A request whose answer nobody reads."""
    host, port = running.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def _generated(sample) -> int:
    return len(sample.tokens) - sample.prompt_length


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode", "queued"])
def test_a_client_that_leaves_frees_its_pages(toy, phase, stream):
    """Within one step, in any phase; the one that goes on is not touched."""
    going_on = {"prompt": "over the lazy", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    expected = toy.text(**going_on)
    scheduler, steps = toy.engine.scheduler, serve_toys.Steps(toy)
    reached = {
        "prefill": lambda: len(scheduler.running) == 2 and 0 < scheduler.running[-1].cached < 200,
        "decode": lambda: len(scheduler.running) == 2 and _generated(scheduler.running[-1]) > 3,
        "queued": lambda: len(scheduler.waiting) == 1,
    }[phase]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        steps.hold_when(lambda: len(scheduler.running) == 1)
        other = pool.submit(toy.text, **going_on)
        steps.wait_held()
        if phase == "queued":
            holder = connect(toy, LONG)
            steps.wait_inbox()
            steps.hold_when(lambda: len(scheduler.running) == 2)
            steps.wait_held()
        prompt = toys.prompts(1, 200, 200)[0] if phase == "prefill" else LONG["prompt"]
        leaver = connect(toy, LONG | {"prompt": prompt, "stream": stream, "max_tokens": 40})
        steps.wait_inbox()
        steps.hold_when(reached)
        steps.wait_held()
        sample = (scheduler.waiting if phase == "queued" else scheduler.running)[-1]
        before = toy.engine.stats.steps
        leaver.close()
        steps.wait_inbox()  # the server has seen it
        steps.hold_when(lambda: sample not in scheduler.running and sample not in scheduler.waiting)
        steps.wait_held()
        assert toy.engine.stats.steps - before == 1  # the step in which it was held
        steps.run()
        if phase == "queued":
            holder.close()
        assert other.result(60) == expected
    toy.wait(toy.idle)
    aborts = 1 + (phase == "queued")
    toy.wait(lambda: toy.metric("vllm:request_success_total", model_name="toy", finished_reason="abort") == aborts)


def test_a_reader_that_takes_nothing_is_let_go(folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, send_timeout=0.4) as running:
        # accepted connections inherit it
        running.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            host, port = running.url.removeprefix("http://").split(":")
            reader.connect((host, int(port)))
            # answers larger than the buffers of both sides: log-probabilities of 20 tokens for each of 16 samples
            data = json.dumps(LONG | {"stream": True, "n": 16, "logprobs": 20, "max_tokens": 150}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
            reader.sendall(head.encode() + data)
            aborted = {"model_name": "toy", "finished_reason": "abort"}
            running.wait(lambda: running.metric("vllm:request_success_total", **aborted) == 1, 60)
            running.wait(lambda: running.state.in_flight == 0)
        running.wait(running.idle)
        assert running.text(prompt="x", max_tokens=1, ignore_eos=True, seed=1)


def test_one_request_whose_step_raises_fails_alone(folder):
    """The engine goes on; the others give the bytes that they give without it."""
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}) as running:
        prompts = toys.prompts(6, 5, 20)
        asked = [{"prompt": prompt, "max_tokens": 15, "temperature": 0, "ignore_eos": True} for prompt in prompts]
        expected = [running.text(**one) for one in asked]
        hidden, poison = running.engine.model.hidden, 299

        def raising(tokens, cache):
            if bool((tokens == poison).any()):
                raise RuntimeError("a kernel at 0x7f0012345678 failed")
            return hidden(tokens, cache)

        running.engine.model.hidden = raising
        bad = {"prompt": [5, 6, poison, 7], "max_tokens": 5}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            good = [pool.submit(running.text, **one) for one in asked]
            failed = [pool.submit(running.post, "/v1/completions", **bad) for _ in range(2)]
            assert [future.result(30) for future in good] == expected
            for future in failed:
                found = future.result(30)
                assert found.status_code == 500 and found.headers["x-should-retry"] == "false"
                serve_toys.check_no_internals(found.text)
        assert running.metric("vllm:request_success_total", model_name="toy", finished_reason="error") == 2
        assert running.metric("foveate:engine_failed_steps", model_name="toy") >= 1
        running.wait(running.idle)


def test_an_engine_that_cannot_step_ends_its_requests(folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}) as running:
        step = running.engine.step
        running.engine.step = lambda: 1 / 0
        assert running.error(500, **LONG)["code"] == "engine_error"
        running.engine.step = step
        assert running.text(prompt="x", max_tokens=1, ignore_eos=True, seed=1)
        running.wait(running.idle)


def test_an_engine_that_freezes_is_not_ready(folder):
    """Idle is ready, however long; frozen is not; and neither a busy nor a frozen engine holds up /health."""
    with serve_toys.serving(
        {"toy": lambda: serve_toys.make_llm(folder)}, stall_timeout=0.3, hang_timeout=0.8, max_engine_restarts=0
    ) as running:
        time.sleep(0.5)
        assert running.get("/ready").status_code == 200
        step, let = running.engine.step, threading.Event()

        def frozen():
            assert let.wait(20)
            return step()

        running.engine.step = frozen
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            future = pool.submit(running.text, prompt="x", max_tokens=2, seed=1, ignore_eos=True)
            running.wait(lambda: running.get("/ready").status_code == 503)
            assert "no step for" in running.get("/ready").json()["waiting_for"][0]
            running.wait(lambda: running.get("/health").status_code == 503)
            assert running.get("/health").json()["hanging"] == ["toy"]
            let.set()
            assert future.result(20)
        assert running.get("/ready").status_code == 200 and running.get("/health").status_code == 200


def test_an_engine_that_hangs_is_restarted(folder):
    """A request of which the client has seen nothing gets its bytes all the same, a stream that has begun ends with an error; and what
    the hung step brings, when it returns after all, is dropped."""
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, max_engine_restarts=1) as running:
        asked = LONG | {"max_tokens": 230}
        expected, old = running.text(**asked), running.engine
        both, hangs, let, returned = (threading.Event() for _ in range(4))
        together = []
        step = old.step

        def hanging():
            assert both.wait(60)
            if len(old.scheduler.running) < 2 or len(together) < 5:
                together.extend([1] * (len(old.scheduler.running) == 2))
                return step()
            hangs.set()
            assert let.wait(60)
            outputs = step()
            returned.set()
            return outputs

        old.step = hanging
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            whole = pool.submit(running.text, **asked)
            stream = pool.submit(running.post, "/v1/completions", **asked, stream=True)
            running.wait(lambda: running.state.admission(running.state.models["toy"]).samples == 2, 60)
            both.set()
            assert hangs.wait(60)
            running.state.watchdog.hang_timeout = 0.2
            running.wait(lambda: running.state.watchdog.restarts, 60)
            running.state.watchdog.hang_timeout = 600
            last = [line for line in stream.result(60).text.splitlines() if line.startswith("data: {")][-1]
            assert json.loads(last[6:])["error"]["code"] == "engine_restarted"
            assert whole.result(60) == expected
        health = running.get("/health")
        assert health.status_code == 200 and health.json()["engine_restarts"] == {"toy": 1}
        assert running.engine is not old and running.metric("foveate:engine_restarts", model_name="toy") == 1
        let.set()
        assert returned.wait(60)
        assert running.text(**asked) == expected and running.get("/ready").status_code == 200
        running.wait(running.idle)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_thread_has_ended_is_restarted(folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}) as running:
        running.engine.step = lambda: (_ for _ in ()).throw(SystemExit)  # what no except Exception holds
        assert running.text(prompt="x", max_tokens=3, seed=1, ignore_eos=True)
        assert running.get("/health").json()["engine_restarts"] == {"toy": 1}


def test_a_flood_is_turned_away_and_the_accepted_finish(folder):
    """The reservation is one with the check, so a burst never has more samples than there are places."""
    load = {"toy": lambda: serve_toys.make_llm(folder, max_batch=2)}
    with serve_toys.serving(load, max_queue=4) as running:
        step, most = running.engine.step, [0]

        def slowly():
            time.sleep(0.01)
            admission = running.state.admission(running.state.models["toy"])
            most[0] = max(most[0], admission.samples)
            return step()

        running.engine.step = slowly
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            asked = [
                pool.submit(running.post, "/v1/completions", **(LONG | {"max_tokens": 20, "n": 2})) for _ in range(40)
            ]
            found = [future.result(30) for future in asked]
        statuses = [response.status_code for response in found]
        assert set(statuses) == {200, 429} and most[0] <= 6
        for response in found:
            if response.status_code == 429:
                assert (
                    1 <= int(response.headers["retry-after"]) <= 60 and response.json()["error"]["code"] == "queue_full"
                )
        assert running.metric(
            "vllm:admission_rejections_total", model_name="toy", reason="queue_full"
        ) == statuses.count(429)
        assert "takes 6 in all" in running.error(400, **(LONG | {"n": 7}))["message"]
        running.wait(running.idle)
        assert running.state.admission(running.state.models["toy"]).samples == 0


def test_prompt_tokens_that_wait_are_bounded(toy):
    toy.state.admission(toy.state.models["toy"]).max_queue_tokens = 250
    prompts = toys.prompts(4, 200, 200)
    steps = serve_toys.Steps(toy)
    steps.hold_when(lambda: True)
    leaver = connect(toy, LONG | {"prompt": prompts[0], "max_tokens": 2})
    steps.wait_held()
    assert "prompts of 200 tokens wait" in toy.error(429, prompt=prompts[1], max_tokens=2)["message"]
    leaver.close()
    steps.wait_inbox()
    steps.run()
    toy.wait(toy.idle)
    toy.wait(lambda: toy.post("/v1/completions", prompt=prompts[1], max_tokens=2).status_code == 200)


def test_an_answer_that_takes_too_long(toy):
    object.__setattr__(toy.state.settings, "request_timeout", 0.5)
    running, steps = toy.engine.scheduler.running, serve_toys.Steps(toy)

    def halfway() -> bool:
        return bool(running) and _generated(running[0]) > 3

    steps.hold_when(halfway)
    found = toy.post("/v1/completions", **LONG)
    assert found.status_code == 408 and found.headers["x-should-retry"] == "false"
    steps.wait_inbox()  # the abort
    steps.run()
    toy.wait(toy.idle)
    steps.hold_when(halfway)
    events = toy.events("/v1/completions", **LONG)
    assert events[-1]["error"]["code"] == "request_timeout" and len(events) > 1
    steps.wait_inbox()
    steps.run()
    toy.wait(toy.idle)


def test_silence_is_filled_with_comments(toy):
    object.__setattr__(toy.state.settings, "keep_alive", 0.05)
    steps = serve_toys.Steps(toy)
    steps.hold_when(lambda: True)
    asked = LONG | {"prompt": toys.prompts(1, 200, 200)[0], "stream": True, "max_tokens": 3}
    with toy.client.stream("POST", toy.url + "/v1/completions", json=asked) as response:
        lines = []
        for line in response.iter_lines():
            lines.append(line)
            if lines.count(": keep-alive") == 2:
                steps.run()
    first = next(i for i, line in enumerate(lines) if line.startswith("data: "))
    assert [line for line in lines[:first] if line][:2] == [": keep-alive"] * 2 and lines[-2] == "data: [DONE]"


def test_a_long_prompt_holds_up_nobody(toy):
    """While it is read in chunks, the stream beside it gets a token in each step, so between its tokens is one chunk at the most."""
    engine, step, seen = toy.engine, toy.engine.step, []

    def watched():
        outputs = step()
        seen.append({s.prompt_length: (s.cached, _generated(s)) for s in engine.scheduler.running})
        return outputs

    engine.step = watched
    victim = {"prompt": toys.prompts(1, 9, 9)[0], "max_tokens": 120, "temperature": 0, "ignore_eos": True}
    expected = toy.text(**victim)
    steps = serve_toys.Steps(toy)
    steps.hold_when(lambda: any(_generated(s) == 3 for s in engine.scheduler.running))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        stream = pool.submit(toy.text, **victim)
        steps.wait_held()
        long = pool.submit(toy.text, prompt=toys.prompts(1, 200, 200)[0], max_tokens=1, ignore_eos=True)
        steps.wait_inbox()
        seen.clear()
        steps.run()
        assert long.result(60) is not None and stream.result(60) == expected
    reading = [both for both in seen if 200 in both and both[200][1] == 0 and 9 in both]
    assert len(reading) >= 20
    for before, after in itertools.pairwise(reading):
        assert after[9][1] == before[9][1] + 1 and after[200][0] - before[200][0] <= 8


def test_probes_answer_while_every_place_is_taken(folder):
    """In a time that has nothing to do with that of the requests; the engine is held, so those have no end."""
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder, max_batch=2)}, max_queue=20) as running:
        steps = serve_toys.Steps(running)
        steps.hold_when(lambda: len(running.engine.scheduler.running) == 2)
        connections = [connect(running, LONG | {"stream": True}) for _ in range(22)]
        steps.wait_held()
        running.wait(lambda: running.state.in_flight == 22, 60)
        assert running.error(429, prompt="x")["code"] == "queue_full"
        for path in ("/health", "/ready", "/metrics"):
            assert running.get(path).status_code == 200
        for connection in connections:
            connection.close()
        steps.run()
        running.wait(running.idle, 60)


def test_the_hundredth_request_is_as_cheap_as_the_first(toy):
    """Nothing of a request stays: no job, page or sample, and a request takes as many steps as ever."""
    took = []
    for i in range(120):
        before = toy.engine.stats.steps
        toy.text(prompt=[5 + i, 6, 7, 8, 9], max_tokens=6, temperature=0, ignore_eos=True)
        toy.wait(lambda: toy.worker.idle)
        took.append(toy.engine.stats.steps - before)
    assert set(took) == {6}
    assert toy.idle() and not toy.worker._held and not toy.engine.scheduler.waiting
    assert len(toy.engine.scheduler.prefix) <= toy.engine.num_pages
