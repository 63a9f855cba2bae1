"""Running the application: signals, the drain, TLS, logs."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn

from foveate.serve.app import create_app
from foveate.serve.gate import JsonLines
from foveate.serve.state import ServerState

log = logging.getLogger("foveate.serve")


class Server(uvicorn.Server):
    """The first SIGTERM or SIGINT drains: new requests get 503 and running ones finish, within drain_timeout. A second one ends at once."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self.state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None
        self.failed = False

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        loop = self._loop

        def end() -> None:
            loop.call_soon_threadsafe(self._end_failed)

        self.state.on_failed_load = end
        await super().startup(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self.state.draining:
            log.info("%s again: the server ends now", signal.Signals(sig).name)
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        if self._drain is None:
            self.state.draining = True
            self._drain = asyncio.ensure_future(self._until_empty())

    async def _until_empty(self) -> None:
        timeout = self.state.settings.drain_timeout
        log.info("the server drains: %d requests run, and have %g s", self.state.in_flight, timeout)
        deadline = asyncio.get_running_loop().time() + timeout
        while self.state.in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if self.state.in_flight:
            log.warning("%d requests had not finished within %g s and are ended", self.state.in_flight, timeout)
            self.force_exit = True
        self.should_exit = True

    def _end_failed(self) -> None:
        self.failed = self.should_exit = True


def make_server(state: ServerState) -> Server:
    settings = state.settings
    config = uvicorn.Config(
        create_app(state), host=settings.host, port=settings.port, loop="auto", http="httptools", ws="none", log_config=None,
        access_log=False, server_header=False, lifespan="on", timeout_graceful_shutdown=5,
        ssl_certfile=settings.certificate, ssl_keyfile=settings.certificate_key,
    )  # fmt: skip
    return Server(config, state)


def run(state: ServerState) -> None:
    """Until a signal. RuntimeError when a model cannot be loaded or the port is taken."""
    settings = state.settings
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise RuntimeError(
            f"port {settings.port} of {settings.host} cannot be had: {error}; choose another --port"
        ) from None
    where = f"http{'s' if settings.certificate else ''}://{settings.host}:{listener.getsockname()[1]}/v1"
    raise_open_files()
    print(f"foveate serves {', '.join(state.models)} at {where}", file=sys.stderr, flush=True)
    set_up_logs()
    server = make_server(state)
    state.on_loaded = settle_heap
    try:
        server.run(sockets=[listener])
    finally:
        state.stop()
    if server.failed:
        raise RuntimeError("; ".join(f"{m.name}: {m.error}" for m in state.models.values() if m.error is not None))


def raise_open_files(most: int = 65_536) -> None:
    """Each stream is a file to the system, which lets a process have 1,024 at first, and as many as its hard limit if it asks."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def settle_heap() -> None:
    """What is there now stays, so the collector of cycles need not look at it: with models loaded it took half of a request's time."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def set_up_logs() -> None:
    """JSON lines on stderr; a library's warnings too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("foveate.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:], logger.propagate = [handler], False
        logger.setLevel(level)
