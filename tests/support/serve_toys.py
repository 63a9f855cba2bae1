"""A server in a thread, with the toy model of generation_toys behind it, and clients for it."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

import foveate
import generation_toys as toys
from foveate.serve import ServerState, ServeSettings
from foveate.serve.server import Server, make_server

TOOL_TEMPLATE = (
    "{% if tools %}<tool_call> {{ tools | tojson }}\n{% endif %}{% for m in messages %}<user>{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}\n{% endfor %}assistant:"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
LLM_OPTIONS = {"num_pages": 64, "page_size": 4, "progress": False}


def check_no_internals(text: str) -> None:
    """Addresses, modules and stack traces tell an attacker what to attack: CVE-2026-22778 began with one in an error message."""
    found = re.search(r"0x[0-9a-f]{6,}|Traceback|site-packages|\bobject at\b|\.py\b|line \d+, in ", text)
    assert found is None, f"{found[0]!r} in {text[:500]}"


@dataclass
class Running:
    """url: without a slash at its end. state: of the server, which the tests look into."""

    url: str
    state: ServerState
    client: httpx2.Client
    server: Server
    thread: threading.Thread

    @property
    def engine(self) -> Any:
        return next(iter(self.state.models.values())).worker.engine

    @property
    def worker(self) -> Any:
        return next(iter(self.state.models.values())).worker

    def post(self, path: str, **body: Any) -> Any:
        return self.client.post(self.url + path, json=body)

    def get(self, path: str) -> Any:
        return self.client.get(self.url + path)

    def text(self, **body: Any) -> str:
        found = self.post("/v1/completions", **body)
        assert found.status_code == 200, found.text
        return found.json()["choices"][0]["text"]

    def error(self, status: int, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
        """The error object of a request that must fail with this status."""
        found = self.post(path, **body)
        assert found.status_code == status, found.text
        assert set(found.json()) == {"error"}
        error = found.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
        check_no_internals(found.text)
        return error

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The JSON of all events of a stream, which must end with [DONE]."""
        with self.client.stream("POST", self.url + path, json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            found = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
        assert found[-1] == "[DONE]"
        return [json.loads(event) for event in found[:-1]]

    def metric(self, name: str, **labels: str) -> float:
        from prometheus_client.parser import text_string_to_metric_families

        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    return sample.value
        raise KeyError(f"{name} {labels}")

    def wait(self, condition: Any, seconds: float = 10.0) -> None:
        """Until the condition holds; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            time.sleep(0.005)

    def idle(self) -> bool:
        """Nothing runs, and no page is lost."""
        engine = self.engine
        if engine.has_work or len(engine.cache):
            return False
        toys.check_pages(engine)
        return True


class Steps:
    """Holds the engine between two steps, so that a test decides in which phase something happens, however slow the machine is."""

    def __init__(self, running: Running, engine: Any = None) -> None:
        """engine: another one than the first model's."""
        engine = engine or running.engine
        self._running, self._step = running, engine.step
        self._condition: Callable[[], bool] = lambda: False
        self._held, self._go = threading.Event(), threading.Event()
        engine.step = self._when_let

    def _when_let(self) -> Any:
        if self._condition():
            self._held.set()
            assert self._go.wait(60), "the test did not let the engine go on"
            self._go.clear()
        return self._step()

    def hold_when(self, condition: Callable[[], bool]) -> None:
        """The engine stops before the first step at whose start this holds; if it is held now, it goes on."""
        self._condition = condition
        if self._held.is_set():
            self._held.clear()
            self._go.set()

    def wait_held(self) -> None:
        assert self._held.wait(60), "the engine did not come to where it is to be held"

    def run(self) -> None:
        self.hold_when(lambda: False)

    def wait_inbox(self) -> None:
        """Until a request or an abort waits for the step to end."""
        self._running.wait(lambda: self._running.worker._inbox, 60)


def make_llm(folder: Path, **options: Any) -> foveate.LLM:
    return foveate.LLM(folder, **(LLM_OPTIONS | options))


@contextlib.contextmanager
def serving(loaders: dict[str, Any], *, ready: bool = True, **settings: Any) -> Iterator[Running]:
    """A server on a free port of this machine, ended at the end."""
    state = ServerState(ServeSettings(**({"models": {name: name for name in loaders}, "port": 0} | settings)), loaders)
    server = make_server(state)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    key = next((key for key in settings.get("api_keys", ()) if isinstance(key, str)), None)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx2.Client(timeout=30, headers=headers, trust_env=False) as client:
            running = Running(f"http://127.0.0.1:{port}", state, client, server, thread)
            if ready:
                running.wait(lambda: running.get("/ready").status_code == 200, 20)
            yield running
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not end"
        state.stop()


def raw(url: str, data: bytes, until: bytes | None = None, wait: float = 30.0) -> bytes:
    """What the server answers to these bytes, until it closes, `until` has come or `wait` seconds are silent."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(data)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while (until is None or until not in answer) and (part := connection.recv(65536)):
                answer += part
        return answer
