"""Bodies of requests on their way from bytes to models, and how the OpenAPI description speaks of them."""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Request
from pydantic.json_schema import models_json_schema

from foveate.serve.errors import bad_request
from foveate.serve.protocol import Body
from foveate.serve.state import ServerState

T = TypeVar("T", bound=Body)
_LARGE = 100_000  # bytes of a body that are parsed in a thread
_described: dict[str, type[Body]] = {}


async def parse_body(state: ServerState, request: Request, kind: type[T]) -> T:
    """ApiError 400 for one that cannot be taken. A model's name in the path, as openai 0.28 writes `engine=`, goes into the field."""
    raw: bytes = request.scope["foveate_body"]
    body = await state.prepare(kind.parse, raw, heavy=len(raw) > _LARGE)
    engine, named = request.path_params.get("engine"), getattr(body, "model", None)
    if engine is not None and named is not None and named != engine:
        raise bad_request(
            f"model={named[:100]!r} is not the {engine[:100]!r} of the path; leave the field out", "model"
        )
    return body if engine is None else body.model_copy(update={"model": engine})


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
