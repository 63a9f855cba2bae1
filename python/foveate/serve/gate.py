"""What every request passes: its id, the key, the size and time of its body, the log; and that no exception becomes a bare 500."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from foveate.serve.errors import ApiError, error_response
from foveate.serve.keys import OPEN_PATHS, caller
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState, users

log = logging.getLogger("foveate.serve")
requests_log = logging.getLogger("foveate.serve.requests")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NOT_LOGGED = OPEN_PATHS | {"/metrics", "/load"}


class Gate:
    """A pure ASGI application around another. scope["foveate"] is the request's record, to which the routes add for the log;
    scope["foveate_send"] sends without passing here again, once a response has begun."""

    def __init__(self, app: Any, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.perf_counter(), scope["headers"]
        record: dict[str, Any] = {"id": _request_id(headers), "method": scope["method"], "path": scope["path"]}
        scope["foveate"], scope["foveate_send"] = record, send
        given: list[ServedModel] = []
        users.set(given)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", record["id"].encode())]
            await send(message)

        counts = scope["path"] not in _NOT_LOGGED
        self.state.in_flight += counts
        try:
            await self._pass(scope, receive, answer, record)
        except ApiError as error:
            record["error"] = error.code or error.message
            if "status" not in record:
                await error_response(error)(scope, receive, answer)
        except Exception:
            log.exception("a request failed", extra={"request": record["id"]})
            record["error"] = "internal"
            if "status" not in record:
                failed = ApiError(
                    500,
                    f"the server failed on this request ({record['id']}); its log has the reason",
                    code="internal_error",
                )
                await error_response(failed)(scope, receive, answer)
        finally:
            for served in given:
                served.users -= 1
            self.state.in_flight -= counts
            self._note(scope, record, time.perf_counter() - began, counts)

    async def _pass(self, scope: Any, receive: Any, send: Any, record: dict[str, Any]) -> None:
        key = self.state.keys.check(scope["path"], scope["headers"])
        record["key"] = None if key is None else key.name
        caller.set(key)
        body = await self._body(scope, receive)
        record["bytes"] = len(body)
        scope["foveate_body"] = body
        given = False

        async def again() -> Any:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)

    async def _body(self, scope: Any, receive: Any) -> bytes:
        """The whole of it. ApiError 413 as soon as it is too large, 408 when it does not come."""
        most = self.state.settings.max_body_bytes
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if declared.isdigit() and len(declared) < 20 and int(declared) > most:
            raise _too_large(int(declared), most)
        parts, size = [], 0
        deadline = time.monotonic() + self.state.settings.body_timeout
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.01, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {self.state.settings.body_timeout:g} s", code="body_timeout"
                ) from None
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client left before its body had arrived", code="disconnected")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise _too_large(size, most)
            if not message.get("more_body"):
                return b"".join(parts)

    def _note(self, scope: Any, record: dict[str, Any], seconds: float, counts: bool) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.state.metrics.responses.labels(route, str(record.get("status", 499))).inc()
        if counts and self.state.settings.log_requests:
            requests_log.info("request", extra={"record": {**record, "seconds": round(seconds, 6)}})


def _too_large(size: int, most: int) -> ApiError:
    return ApiError(
        413,
        f"the body has {size} bytes or more, and this server takes {most}; send less, or raise --max-body-bytes",
        code="body_too_large",
    )


def _request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's X-Request-Id where it is a plain one."""
    for name, value in headers:
        if name == b"x-request-id" and _ID.fullmatch(text := value.decode("latin-1")):
            return text
    return uuid.uuid4().hex


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        found: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        found |= {name: value for name in ("job", "request") if (value := getattr(record, name, None)) is not None}
        found |= {name: value for name, value in getattr(record, "record", {}).items() if value is not None}
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, ensure_ascii=False, default=str)
