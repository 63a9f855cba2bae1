"""An answer on its way: it holds the call's places, watches for the client's leaving, and writes JSON or server-sent events."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator
from typing import Any

from starlette.responses import Response

from foveate.generation.outputs import RequestOutput
from foveate.serve.errors import ApiError, dumps, dumps_finite, error_response, json_response, of_model
from foveate.serve.inspection import Inspected
from foveate.serve.jobs import Call, Job
from foveate.serve.keys import caller
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"),
]  # fmt: skip
_KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which clients skip


class Writer:
    """Says the call's outputs in the words of an endpoint. operation: what traces call it."""

    operation = "text_completion"

    def chunks(self) -> Iterator[dict[str, Any]]:
        """What is new since the last time."""
        raise NotImplementedError

    def events(self) -> bytes:
        """Those of `chunks`."""
        return b"".join(map(self.frame, self.chunks()))

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """After everything else, such as the usage."""
        return iter(())

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        raise NotImplementedError

    def beside(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A chunk of these fields alone."""
        return fields

    def frame(self, chunk: dict[str, Any]) -> bytes:
        """The server-sent event of a chunk."""
        return dumps_event(chunk)

    def end(self, error: ApiError | None = None) -> bytes:
        """The last bytes of a stream; error: why it breaks off, as an event that clients raise."""
        return (b"" if error is None else dumps_event(error.body)) + dumps_event("[DONE]")


class OfChoices(Writer):
    """Writes chunks that are the same but for their one choice, so the rest of them is encoded once.

    head: what a chunk, and a whole answer, has beside its choices. usage: whether it is asked for; then chunks have it as null.
    """

    def __init__(self, head: dict[str, Any], usage: bool) -> None:
        self._head, self._usage = head, usage
        self._before = b"data: " + dumps(head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    def choices(self) -> Iterator[dict[str, Any]]:
        """What is new since the last time, of one choice each."""
        raise NotImplementedError

    def beside(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [], **fields}

    def events(self) -> bytes:
        return b"".join([self._before + dumps_finite(choice) + self._after for choice in self.choices()])


class Answer(Response):
    """What a route returns. Its places in the queue are taken and given back here, whatever happens."""

    def __init__(
        self,
        state: ServerState,
        served: ServedModel,
        call: Call,
        writer: Writer,
        *,
        stream: bool,
        inspected: Inspected | None = None,
    ) -> None:
        self.state, self.served, self.call, self.writer, self.stream = state, served, call, writer, stream
        self.inspected = inspected
        self.background = None  # all of a Response that FastAPI looks at
        key = caller.get()
        for job in call.jobs:
            job.model = served.name
            job.adapter = served.adapter
            job.salt = "" if key is None else key.salt
        self._started = False
        self._send_body: Any = (
            None  # the server's own, for the bytes of each token: without what a request goes through
        )
        self._sending: float | None = None  # since when the client takes no bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        record = scope["foveate"]
        self._send_body = scope.get("foveate_send", send)
        key, reserved = caller.get(), self.call.most_tokens
        name = "" if key is None else key.name
        began, failure = time.time(), None
        try:
            with self.state.admission(self.served).place(self.call, name):
                if key is not None:
                    key.reserve(reserved)
                try:
                    await self._run(receive, send)
                finally:
                    self.state.metrics.used(name, self.call)
                    if key is not None:
                        key.settle(reserved, self.call.used_tokens)
        except ApiError as error:
            failure = error
            record["error"] = error.code or error.message
            self.state.metrics.turned_away(of_model(error, self.served.name))
            if not self._started:
                await error_response(error)(scope, receive, send)
            elif error.status != 499:  # within a stream: an event that clients raise
                await self._send(self.writer.end(error), more=False)
        finally:
            self._describe(record)
            if self.state.tracing is not None:
                self.state.tracing.record(self, scope, began, failure or sys.exc_info()[1])

    async def _run(self, receive: Any, send: Any) -> None:
        _, worker = self.served.causal()
        worker.submit(self.call.jobs)
        gone = asyncio.ensure_future(_until_gone(receive))
        work = asyncio.ensure_future(self._stream(send) if self.stream else self._whole(send))
        try:
            await self._watch(gone, work)
        finally:
            for task in (gone, work):
                task.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
            left = [job for job in self.call.jobs if not job.finished]
            if left:
                worker.abort(left)
                self.state.metrics.aborted(self.served, left)

    async def _watch(self, gone: asyncio.Future[None], work: asyncio.Future[None]) -> None:
        settings = self.state.settings
        deadline = time.monotonic() + settings.request_timeout
        while True:
            patience = min(deadline - time.monotonic(), settings.send_timeout / 2)
            done, _ = await asyncio.wait({gone, work}, timeout=max(0.0, patience), return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()
                return
            if gone in done:
                raise ApiError(499, "the client left", code="disconnected")
            now = time.monotonic()
            if self._sending is not None and now - self._sending > settings.send_timeout:
                raise ApiError(499, "the client takes no bytes", code="slow_client")
            if now >= deadline:
                raise ApiError(
                    408,
                    f"the answer took longer than {settings.request_timeout:g} s; ask for fewer tokens",
                    code="request_timeout",
                )

    async def _inspected(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        return {} if self.inspected is None else {"inspect": await self.inspected.run(outputs)}

    async def _whole(self, send: Any) -> None:
        outputs = await self.call.result()
        response = json_response(self.writer.whole(outputs) | await self._inspected(outputs))
        self._started = True
        await send({"type": "http.response.start", "status": 200, "headers": response.raw_headers})
        await self._send(bytes(response.body), more=False)

    async def _stream(self, send: Any) -> None:
        async for changed in self.call.changes(self.state.settings.keep_alive):
            events = self.writer.events() if changed else _KEEP_ALIVE
            if not self._started:  # only now: what the engine refuses is still an error with its own status
                self._started = self.call.sent = True
                await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
            if events:
                await self._send(events, more=True)
        found = await self._inspected([job.output for job in self.call.jobs if job.output is not None])
        last = [*([self.writer.beside(found)] if found else []), *self.writer.last_chunks()]
        events = b"".join(map(self.writer.frame, last))
        await self._send(events + self.writer.end(), more=False)

    async def _send(self, body: bytes, *, more: bool) -> None:
        self._sending = time.monotonic()
        await self._send_body({"type": "http.response.body", "body": body, "more_body": more})
        self._sending = None

    def _describe(self, record: dict[str, Any]) -> None:
        jobs = self.call.jobs
        record["model"] = self.served.name
        record["prompt_tokens"] = self.call.prompt_tokens
        record["completion_tokens"] = sum(job.generated for job in jobs)
        reasons = [
            s.finish_reason for job in jobs if job.output is not None for s in job.output.outputs if s.finish_reason
        ]
        record["finish_reasons"] = reasons[:8]
        if self.state.settings.log_texts:
            record["prompts"] = [self._text(job) for job in jobs]
            record["replies"] = [s.text for job in jobs if job.output is not None for s in job.output.outputs]
        first = jobs[0]
        if first.started is not None:
            record["queue_seconds"] = round(first.started - first.submitted, 6)
        if first.output is not None and first.output.metrics.first_token_time is not None:
            record["first_token_seconds"] = round(first.output.metrics.first_token_time - first.submitted, 6)

    def _text(self, job: Job) -> str:
        tokenizer = self.served.llm.tokenizer
        return f"ids {job.tokens}" if tokenizer is None else tokenizer.decode(job.tokens, skip_special_tokens=False)


def dumps_event(value: Any) -> bytes:
    return b"data: " + (value.encode() if isinstance(value, str) else dumps(value)) + b"\n\n"


async def _until_gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
