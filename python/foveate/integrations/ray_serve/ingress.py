"""What listens: takes a request whole, sends it to a replica, passes on its answer, and begins again when the replica has died."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from foveate.integrations.ray_serve.replica import Request
from foveate.serve.errors import ApiError, dumps, error_response

_PREFIX = 8192  # characters of a prompt that the router looks at


def build_ingress(replicas: Any, tries: int, most_bytes: int) -> Any:
    """The application of Ray Serve. replicas: the bound deployment."""
    from ray import serve

    def asgi() -> Ingress:
        context = serve.get_replica_context()
        return Ingress(serve.get_deployment_handle("Replica", app_name=context.app_name), tries, most_bytes)

    deployed = serve.deployment(serve.ingress(asgi)()).options(name="Ingress", max_ongoing_requests=10_000)
    return deployed.bind(replicas)


class Ingress:
    """An ASGI application. replicas: the handle of Ray's."""

    def __init__(self, replicas: Any, tries: int, most_bytes: int) -> None:
        self._replicas = replicas.options(stream=True, method_name="answer")
        self._tries, self._most_bytes = tries, most_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        try:
            body = await self._body(receive)
            await self._pass(Request(_plain(scope), body, prefix_of(body)), receive, send)
        except ApiError as error:
            if error.status != 499:
                await error_response(error)(scope, receive, send)

    async def _body(self, receive: Any) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(499, "the client left before its body had arrived", code="disconnected")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most_bytes:
                reason = f"the body has {size} bytes or more, and this server takes {self._most_bytes}; send less"
                raise ApiError(413, reason, code="body_too_large")
            if not message.get("more_body"):
                return b"".join(parts)

    async def _pass(self, request: Request, receive: Any, send: Any) -> None:
        """Answers from a replica; from the next one while none of the answer has gone out. ApiError 503 when there is none."""
        from ray.exceptions import RayActorError, TaskCancelledError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        for _ in range(self._tries):
            answer = self._replicas.remote(request)
            left = asyncio.create_task(_until_left(receive, answer))
            started: list[Any] = []  # the headers, once they have gone out
            try:
                async for message in answer:
                    started = started or message.get("headers", [])
                    await send(message)
                return
            except (TaskCancelledError, asyncio.CancelledError):
                if left.done():
                    return
                raise
            except (RayActorError, ReplicaUnavailableError):
                if started:
                    await _end_lost(started, send)
                    return
            except (BackPressureError, DeploymentUnavailableError) as error:
                reason = "no replica takes requests now; try again in 1 s"
                raise ApiError(503, reason, code="no_replica", retry_after=1) from error
            finally:
                left.cancel()
        reason = f"the replicas that had this request died, {self._tries} of {self._tries} times; try again in 1 s"
        raise ApiError(503, reason, code="replica_lost", retry_after=1)


async def _until_left(receive: Any, answer: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


async def _end_lost(headers: list[Any], send: Any) -> None:
    """Ends an answer whose replica died in the middle: a stream of events with the error, which clients raise; another is cut."""
    if not any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers):
        raise ConnectionError("the replica died in the middle of its answer")
    lost = ApiError(503, "the replica that wrote this answer died; send the request again", code="replica_lost")
    data = b"data: " + dumps(lost.body) + b"\n\ndata: [DONE]\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": False})


def _plain(scope: Any) -> dict[str, Any]:
    """What a replica needs, and can be sent to it."""
    wanted = (
        "type",
        "http_version",
        "method",
        "scheme",
        "path",
        "raw_path",
        "query_string",
        "root_path",
        "headers",
        "client",
        "server",
    )
    return {name: scope[name] for name in wanted if name in scope} | {"asgi": {"version": "3.0"}}


def prefix_of(body: bytes) -> str:
    """The beginning of the prompt or of the conversation; nothing for a body that has none, whose faults the replica tells."""
    try:
        fields = json.loads(body)
        asked = next(fields[name] for name in ("messages", "prompt", "input") if fields.get(name))
    except (ValueError, AttributeError, StopIteration, RecursionError):
        return ""
    return _text(asked)[:_PREFIX]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return _text(value.get("role")) + _text(value.get("content", value.get("text")))
    if isinstance(value, list):
        return "\n".join(_text(one) if not isinstance(one, int) else str(one) for one in value[:_PREFIX])
    return ""
