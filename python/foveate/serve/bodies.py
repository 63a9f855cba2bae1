"""Bodies of requests on their way from bytes to models, and how the OpenAPI description speaks of them."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic.json_schema import models_json_schema

from foveate.serve.protocol import Body
from foveate.serve.state import ServerState

T = TypeVar("T", bound=Body)
_LARGE = 100_000  # bytes of a body that are parsed in a thread
_described: dict[str, type[Body]] = {}


async def parse_body(state: ServerState, request: Request, kind: type[T]) -> T:
    """ApiError 400 for one that cannot be taken."""
    body: bytes = request.scope["foveate_body"]
    return await state.prepare(kind.parse, body, heavy=len(body) > _LARGE)


def takes(kind: type[Body]) -> dict[str, Any]:
    """For the OpenAPI description of a route: what its body is; `body_schemas` has the rest."""
    _described[kind.__name__] = kind
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def body_schemas() -> dict[str, Any]:
    """The components that the descriptions of bodies refer to."""
    kinds: list[Any] = [(kind, "validation") for kind in _described.values()]
    _, found = models_json_schema(kinds, ref_template="#/components/schemas/{model}")
    return found["$defs"]
