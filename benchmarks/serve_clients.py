"""The client's side of benchmarks/serve.py: streams read as they come, streams that wait, and requests that come at a rate."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import time
from collections import Counter
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

HEAD = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"


class Stream(NamedTuple):
    """status: of HTTP, 0 where the connection broke. times: seconds from sending to each token. comments: keep-alives before them."""

    status: int
    times: list[float]
    comments: int = 0


async def _send(port: int, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    writer.write(f"{HEAD}content-length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def one_stream(port: int, body: dict[str, Any]) -> Stream:
    """Only the time of each line is taken while it runs; what a line holds is looked at afterwards, as it costs the server's processors."""
    began = time.perf_counter()
    reader, writer = await _send(port, body)
    lines: list[tuple[float, bytes]] = []
    try:
        status = int((await reader.readline()).split(b" ")[1])
        while line := await reader.readline():
            lines.append((time.perf_counter() - began, line))
    finally:
        await _close(writer)
    if status != 200:
        return Stream(status, [])
    events = [(at, json.loads(line[6:])) for at, line in lines if line.startswith(b"data: {")]
    times = [at for at, event in events for _ in event["choices"][0]["token_ids"]]
    return Stream(status, times, sum(line.startswith(b":") for _, line in lines))


async def all_streams(port: int, bodies: list[dict[str, Any]]) -> tuple[float, list[Stream]]:
    """(seconds, streams), all begun at once."""
    began = time.perf_counter()
    found = await asyncio.gather(*(one_stream(port, body) for body in bodies))
    return time.perf_counter() - began, list(found)


async def waiting_streams(
    port: int, running: list[dict[str, Any]], waiting: list[dict[str, Any]], seconds: float
) -> tuple[list[Stream], Counter[str]]:
    """`running` streams with `waiting` others open beside them, which get no place and so no token before they are given up.

    (the running ones, how the waiting ones were when the running ones had ended or `seconds` had passed: "open", or a status)
    """
    begun = [asyncio.create_task(one_stream(port, body)) for body in running]
    await asyncio.sleep(0.5)
    opened = await asyncio.gather(*(_send(port, body) for body in waiting), return_exceptions=True)
    done, late = await asyncio.wait(begun, timeout=seconds)
    state: Counter[str] = Counter()
    for found in opened:
        if isinstance(found, BaseException):
            state[type(found).__name__] += 1
            continue
        reader, writer = found
        try:
            first = await asyncio.wait_for(reader.readline(), 0.01)
            status = first.split(b" ")[1].decode() if first else "closed"
            state["open" if status == "200" else status] += 1
        except asyncio.TimeoutError:  # not even its status yet: the server holds it
            state["open"] += 1
        await _close(writer)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    return [task.result() for task in done], state


async def at_rate(port: int, bodies: list[dict[str, Any]], rate: float) -> tuple[float, list[Stream]]:
    """(seconds, streams) of requests that come `rate` times a second, whatever becomes of those before them."""

    async def later(delay: float, body: dict[str, Any]) -> Stream:
        await asyncio.sleep(delay)
        try:
            return await one_stream(port, body)
        except (OSError, ValueError, IndexError):
            return Stream(0, [])

    began = time.perf_counter()
    found = await asyncio.gather(*(later(i / rate, body) for i, body in enumerate(bodies)))
    return time.perf_counter() - began, list(found)


def whole_answers(port: int, texts: list[str], tokens: int, model: str = "default") -> float:
    """Tokens per second of all requests at once, none of them streamed, by the server's own count."""

    def ask(text: str) -> int:
        body = json.dumps({"model": model, "prompt": text, "max_tokens": tokens, "temperature": 0}).encode()
        request = Request(f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"})
        with urlopen(request) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        began = time.perf_counter()
        count = sum(pool.map(ask, texts))
        return count / (time.perf_counter() - began)
