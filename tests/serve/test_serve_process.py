"""`foveate serve` as a process: what it prints, SIGTERM while it streams, a second one, a port in use."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import httpx2
import pytest

import foveate
import serve_toys


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def process(folder, *more: str, ready: bool = True):
    """(the process, its address); killed at the end if it still runs."""
    port = free_port()
    arguments = ["serve", "--model", f"toy={folder}", "--port", str(port), "--num-pages", "64", "--threads", "1", *more]
    started = subprocess.Popen(
        [sys.executable, "-m", "foveate", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while ready and time.monotonic() < deadline and started.poll() is None:
            with contextlib.suppress(httpx2.TransportError):
                if httpx2.get(url + "/ready", trust_env=False).status_code == 200:
                    break
            time.sleep(0.05)
        yield started, url
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()
        started.stderr.close()


@contextlib.contextmanager
def unfinished(url: str):
    """A request whose body never comes as a whole: one that runs, for as long as it is open."""
    body = json.dumps({"prompt": "x", "max_tokens": 10}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body) + 5}\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        for _ in range(3):  # connections are accepted in their order, so the server has read it
            httpx2.get(url + "/health", trust_env=False)
        yield


def wait_draining(url: str) -> httpx2.Response:
    """What a new request is told, once there is a drain."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = httpx2.post(url + "/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60, trust_env=False)
        if found.status_code == 503:
            return found
    raise AssertionError("the server does not drain")


def test_sigterm_lets_a_stream_finish(folder):
    """New requests get a 503 that closes the connection; the running one has every token; the exit status is 0."""
    with process(folder) as (started, url), httpx2.Client(timeout=60, trust_env=False) as client:
        body = {
            "prompt": "the quick brown fox",
            "max_tokens": 230,
            "ignore_eos": True,
            "seed": 1,
            "stream": True,
            "return_token_ids": True,
        }
        tokens, refused, last = 0, None, ""
        with client.stream("POST", url + "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    tokens += len(json.loads(line[6:])["choices"][0]["token_ids"])
                if tokens and refused is None:
                    with unfinished(url):
                        started.send_signal(signal.SIGTERM)
                        refused = wait_draining(url)
                last = line if line else last
        assert tokens == 230 and last == "data: [DONE]"
        assert refused.json()["error"]["code"] == "draining" and refused.headers["connection"] == "close"
        log = started.stderr.read()
        assert started.wait(60) == 0
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert any("drains" in line["message"] for line in lines)
        assert any(line.get("completion_tokens") == 230 for line in lines)


def test_a_second_signal_ends_at_once(folder):
    """Also while a request runs: here one of whose body a part never comes."""
    with (
        serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, drain_timeout=600) as running,
        unfinished(running.url),
    ):
        running.server.handle_exit(signal.SIGTERM, None)
        wait_draining(running.url)
        assert not running.server.should_exit
        running.server.handle_exit(signal.SIGTERM, None)
        running.thread.join(60)
        assert not running.thread.is_alive()


def test_what_cannot_be_served(folder, tmp_path, capsys, monkeypatch):
    from foveate.cli import main

    monkeypatch.setattr("foveate.serve.server.set_up_logs", lambda: None)  # they would write to what capsys closes

    def run(*arguments: str, status: int) -> str:
        assert main(["serve", *arguments]) == status
        return capsys.readouterr().err

    assert "open to other machines" in run("--model", str(folder), "--host", "0.0.0.0", status=2)
    assert "nowhere" in run("--model", str(tmp_path / "nowhere"), "--port", "0", status=1).splitlines()[-1]
    assert "two models are called" in run("--model", "a=x", "--model", "a=y", status=2)
    (tmp_path / "golden").write_text("{\n")
    assert "line 1" in run("--model", str(folder), "--canary", str(tmp_path / "golden"), status=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port}" in run("--model", str(folder), "--port", str(port), status=1)


@pytest.mark.parametrize("name", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named(name, monkeypatch, capsys):
    from foveate.cli import main

    monkeypatch.setitem(sys.modules, name, None)
    assert main(["serve", "--model", "x"]) == 1
    assert 'pip install "foveate[serve]"' in capsys.readouterr().err


def test_the_benchmark_counts_every_token(folder, llm, capsys, monkeypatch):
    """With servers in threads in place of processes, which take seconds to start."""
    path = Path(__file__).parents[2] / "benchmarks" / "serve.py"
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location("serve_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    asked: list[int] = []

    @contextlib.contextmanager
    def in_a_thread(server, port, client_cpu):
        assert server[0][2:4] == ["foveate", "serve"]
        load = {"bench": lambda: serve_toys.make_llm(folder)}
        with serve_toys.serving(load, port=port, log_requests=False) as running:
            yield types.SimpleNamespace(pid=os.getpid())
            asked.append(running.metric("vllm:generation_tokens_total", model_name="bench"))

    def in_process(args, given):
        outputs = llm.generate(given, foveate.SamplingParams(max_tokens=args.tokens, ignore_eos=True, temperature=0))
        times = [[0.001 * (i + 1) for i in range(args.tokens)] for _ in given]
        return sum(len(output.outputs[0].token_ids) for output in outputs) / 0.5, times

    monkeypatch.setattr(benchmark, "running", in_a_thread)
    monkeypatch.setattr(benchmark, "in_process", in_process)
    quick = ["--streams", "2", "--prompt", "5", "--tokens", "6", "--rounds", "1", "--threads", "1"]
    others = ["--idle", "3", "--rate", "50", "--seconds", "0.1"]
    assert benchmark.main(["--model", str(folder), *quick, *others]) == 0
    shown = capsys.readouterr().out.splitlines()
    row, idle, rate = map(json.loads, shown[:3])
    # one stream before the two and before the five; those that waited may have begun when the 64 had ended
    assert asked[0] == 18 and 64 * 24 <= asked[1] <= 67 * 24 and asked[2] == 24
    assert idle["open"] == 3 and idle["left"] == 0 and rate["answered"] == 5 and rate["errors"] == 0
    assert shown[3] == "" and len(shown) == 4 + len(benchmark.TARGETS)
    assert row["added_ms_p50"] == pytest.approx(row["between_ms_p50"] - 1, abs=0.01)
    assert row["streams"] == 2 and row["http_tokens_per_s"] > 0 and row["first_ms_p50"] <= row["first_ms_p99"]
