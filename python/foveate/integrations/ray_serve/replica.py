"""One replica: the whole server but its socket, whose requests come from the ingress."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from foveate.serve.app import create_app
from foveate.serve.settings import ServeSettings
from foveate.serve.state import ServerState

_AHEAD = 64  # messages of an answer that wait for the ingress


@dataclass(frozen=True)
class Request:
    """scope: of ASGI, what can be sent of it. prefix: the beginning of the prompt, by which the router chooses."""

    scope: dict[str, Any]
    body: bytes
    prefix: str


class Replica:
    async def __init__(self, settings: ServeSettings) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Ends when the models are loaded: until then Ray sends nothing."""
        from ray import serve

        self._name = serve.get_replica_context().replica_id.unique_id
        self._state = ServerState(settings)
        self._app = create_app(self._state)
        self._state.start()
        while not self._state.readiness()[0]:
            failed = [
                f"{model.name}: {model.error}" for model in self._state.models.values() if model.state == "failed"
            ]
            if failed:
                raise RuntimeError("; ".join(failed))
            await asyncio.sleep(0.05)

    def check_health(self) -> None:
        """Ray calls it, and replaces a replica whose engine makes no steps."""
        hanging = self._state.hanging()
        if hanging:
            raise RuntimeError(f"the engine of {', '.join(hanging)} makes no steps")

    async def answer(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """ASGI's messages. When the ingress cancels this, the request is aborted as by a client that leaves."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_AHEAD)
        gone = asyncio.Event()
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": request.body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-foveate-replica", self._name.encode())]
            if not gone.is_set():
                await messages.put(message)

        async def run() -> None:
            try:
                await self._app(request.scope, receive, send)
            finally:
                if not gone.is_set():
                    await messages.put(None)

        task = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task
        finally:
            gone.set()
            while not messages.empty():  # what waits for room goes on, and sees that nobody is there
                messages.get_nowait()

    def __del__(self) -> None:
        state = getattr(self, "_state", None)
        if state is not None:
            state.stop()
