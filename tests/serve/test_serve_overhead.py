"""What the server does for each token beside the model: once a step, in the time of the kernels, and with the same results."""

import asyncio
import importlib
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
import torch
from prometheus_client import CollectorRegistry, Histogram, generate_latest

import serve_toys
from foveate.generation.outputs import CompletionOutput, RequestMetrics, RequestOutput
from foveate.generation.params import SamplingParams
from foveate.serve.jobs import Call, Job
from foveate.serve.server import raise_open_files
from foveate.serve.settings import ServeSettings
from foveate.serve.token_times import TokenTimes
from foveate.serve.worker import EngineWorker


def test_token_times_are_a_histogram_of_prometheus():
    bounds, rng = (0.001, 0.01, 0.5), random.Random(0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = TokenTimes("vllm:times", "Between tokens.", bounds)
    ours.register(mine)
    histogram = Histogram("vllm:times", "Between tokens.", ["model_name"], buckets=bounds, registry=theirs)
    for model in ("a", "b"):
        mine.add(model)
        histogram.labels(model)
    for value in [*bounds, 0.0, 7.0, *(rng.expovariate(50) for _ in range(200))]:
        mine.observe("a", value)
        histogram.labels("a").observe(value)
    mine.observe("b", 0.25, 3)
    for _ in range(3):
        histogram.labels("b").observe(0.25)

    def lines(registry):
        found = {}
        for line in generate_latest(registry).decode().splitlines():
            if not line.startswith("#") and "_created" not in line:
                name, _, value = line.rpartition(" ")
                found[name] = float(value)
        return found

    assert lines(ours) == pytest.approx(lines(theirs))
    assert 'vllm:times_bucket{le="+Inf",model_name="a"}' in lines(ours)


class FakeEngine:
    """One token a step for each job; each step waits for `go` where kernels would run."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(before_kernels=None)
        self.scheduler = SimpleNamespace(running=[])
        self.running: dict[str, list[int]] = {}
        self.limits: dict[str, int] = {}
        self.in_kernels, self.go = threading.Semaphore(0), threading.Semaphore(0)

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, job_id: str, tokens: list[int], params: SamplingParams, **_: object) -> None:
        self.running[job_id], self.limits[job_id] = [], params.max_tokens

    def abort(self, job_id: str) -> None:
        del self.running[job_id]

    def step(self) -> list[RequestOutput]:
        self.model.before_kernels()
        self.in_kernels.release()
        assert self.go.acquire(timeout=60)
        outputs = []
        for job_id, tokens in list(self.running.items()):
            tokens.append(len(tokens))
            ended = len(tokens) == self.limits[job_id]
            sample = CompletionOutput(0, "", list(tokens), None, None, "length" if ended else None, None)
            outputs.append(RequestOutput(job_id, None, [1], None, [sample], ended, RequestMetrics(0.0)))
            if ended:
                del self.running[job_id]
        return outputs


def overlapping(test: Callable[[FakeEngine, EngineWorker, list[list[int]]], object]) -> None:
    """Runs the coroutine test(engine, worker, delivered); delivered: for each time that the loop was told, the tokens of its jobs."""

    async def run() -> None:
        engine, delivered = FakeEngine(), []
        worker = EngineWorker(
            engine, asyncio.get_running_loop(), lambda jobs: delivered.append([job.generated for job in jobs])
        )
        worker.start()
        try:
            await test(engine, worker, delivered)
        finally:
            engine.go.release(100)
            worker.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


def job(name: str, tokens: int) -> Job:
    found = Job(name, [1], SamplingParams(max_tokens=tokens))
    Call([found])
    return found


async def in_kernels(engine: FakeEngine) -> None:
    assert await asyncio.to_thread(engine.in_kernels.acquire, timeout=60)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_the_loop_is_told_of_a_step_in_the_kernels_of_the_next_one():
    async def test(engine, worker, delivered):
        worker.submit([job("a", 3)])
        await in_kernels(engine)
        assert delivered == []
        for tokens in (1, 2):
            engine.go.release()
            await in_kernels(engine)  # of the next step, before which it was told
            await until(lambda tokens=tokens: len(delivered) == tokens)
            assert delivered[-1] == [tokens]
        engine.go.release()
        await until(lambda: len(delivered) == 3)  # nothing comes after the last step, so it is told at once
        assert delivered[-1] == [3] and worker.idle

    overlapping(test)


def test_a_step_that_ends_in_an_abort_of_all_others_is_told():
    async def test(engine, worker, delivered):
        short, long = job("short", 1), job("long", 100)
        worker.submit([short, long])
        await in_kernels(engine)
        worker.abort([long])  # obeyed before the next step, which there is none of then
        engine.go.release()
        await until(lambda: short.finished and bool(delivered))
        await until(lambda: worker.idle)
        assert delivered == [[1, 1]]

    overlapping(test)


def test_a_model_without_kernels_of_its_own_tells_at_the_end_of_a_step():
    async def test(engine, worker, delivered):
        engine.step_with_kernels = engine.step
        engine.model = SimpleNamespace()

        def step():
            engine.model.before_kernels = lambda: None
            try:
                return engine.step_with_kernels()
            finally:
                del engine.model.before_kernels

        engine.step = step
        worker.submit([job("a", 2)])
        await in_kernels(engine)
        engine.go.release()
        await in_kernels(engine)
        await until(lambda: delivered == [[1]])

    overlapping(test)


def test_silence_is_told_after_patience_and_not_after_each_change():
    async def run() -> None:
        found = job("a", 5)
        call, seen = found.call, []
        assert call is not None

        async def read() -> None:
            async for changed in call.changes(0.05):
                seen.append(changed)

        reader = asyncio.create_task(read())
        await until(lambda: seen[:2] == [False, False])  # comments, as long as nothing comes
        found.error = ValueError("ended")
        call.wake()
        with pytest.raises(ValueError, match="ended"):
            await reader
        assert not any(seen)

    asyncio.run(asyncio.wait_for(run(), 60))


def calls_a_token(toy, streams: int, tokens: int) -> float:
    """Functions of Python and C that the event loop's thread enters for each token of streams that run together.

    Counted, not timed: another process cannot change it. Requests are in it, too."""
    counts = {"call": 0, "c_call": 0}

    def count(frame, event, argument) -> None:
        if event in counts:
            counts[event] += 1

    def in_loop(function) -> None:
        done = threading.Event()
        toy.worker._loop.call_soon_threadsafe(lambda: (function(), done.set()))
        assert done.wait(60)

    async def all_streams() -> list[bytes]:
        async with httpx2.AsyncClient(timeout=60, trust_env=False) as client:
            asked = {"prompt": [5, 6, 7], "max_tokens": tokens, "ignore_eos": True, "stream": True}
            answers = [client.post(toy.url + "/v1/completions", json={**asked, "seed": i}) for i in range(streams)]
            return [answer.content for answer in await asyncio.gather(*answers)]

    in_loop(lambda: sys.setprofile(count))
    try:
        found = asyncio.run(all_streams())
    finally:
        in_loop(lambda: sys.setprofile(None))
    assert all(body.endswith(b"data: [DONE]\n\n") for body in found)
    return sum(counts.values()) / (streams * tokens)


def test_http_adds_little_work_to_a_token(toy):
    """The longer the streams, the less their requests count; what stays is a token's own."""
    short, long = (calls_a_token(toy, 8, tokens) for tokens in (20, 120))
    a_token = (120 * long - 20 * short) / 100
    assert a_token < 60, f"{a_token:.0f} calls for each token"


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [0])(0)) < 2, reason="it needs two processors")
def test_http_has_processors_of_its_own(folder):
    """The kernels' threads are started by the engine's, and so bound as it is."""
    every, where = os.sched_getaffinity(0), {}
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, http_processors=1) as running:
        step = running.engine.step

        def looking():
            where["engine"] = os.sched_getaffinity(0)
            return step()

        running.engine.step = looking
        assert running.text(prompt="x", max_tokens=2, ignore_eos=True)
        running.worker._loop.call_soon_threadsafe(lambda: where.setdefault("loop", os.sched_getaffinity(0)))
        running.wait(lambda: "loop" in where)
        assert torch.get_num_threads() <= len(every) - 1
    assert where["loop"] == {max(every)} and where["engine"] == every - where["loop"]
    for count in (len(every), -1):
        with pytest.raises(
            ValueError, match=f"http_processors={count} must be from 0 to {len(every) - 1}|must be from 0 to 0"
        ):
            ServeSettings({"toy": "toy"}, http_processors=count)


def test_open_files_are_raised_to_the_hard_limit(monkeypatch):
    resource = pytest.importorskip("resource")
    found = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: found.append(limits))
    for have in ((1024, 4096), (1024, 2**20), (4096, 4096), (1024, resource.RLIM_INFINITY)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, have=have: have)
        raise_open_files()
    assert found == [(4096, 4096), (65_536, 2**20), (65_536, resource.RLIM_INFINITY)]


def test_who_asks_for_the_load_is_not_part_of_it(toy):
    assert toy.get("/load").json() == {"server_load": 0}


def test_the_clients_of_the_benchmark(toy, monkeypatch):
    """Streams that wait are told from those that were turned away, and a rate from what became of its requests."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    clients = importlib.import_module("serve_clients")
    port = int(toy.url.rpartition(":")[2])
    asked = {"prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
    good, wrong = {**asked, "max_tokens": 4}, {**asked, "max_tokens": 4, "stop": 7}
    seconds, streams = asyncio.run(clients.at_rate(port, [good, wrong, good], 50))
    assert [stream.status for stream in streams] == [200, 400, 200] and seconds >= 0.04
    assert [len(stream.times) for stream in streams] == [4, 0, 4] and streams[0].times == sorted(streams[0].times)
    steps = serve_toys.Steps(toy)
    steps.hold_when(lambda: True)
    try:
        running, state = asyncio.run(clients.waiting_streams(port, [good], [good, good, wrong], 0.5))
    finally:
        steps.run()
    assert running == [] and state == {"open": 2, "400": 1}
    toy.wait(toy.idle, 60)
