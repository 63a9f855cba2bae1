"""The routes of those who may change what is served: a key with "admin" in the file of keys is needed for each."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from foveate.serve.bodies import parse_body, takes
from foveate.serve.errors import json_response
from foveate.serve.keys import require_admin
from foveate.serve.protocol import Body
from foveate.serve.state import ServerState
from foveate.serve.versions import candidate_name


class LoadAdapterBody(Body):
    """vLLM's. lora_path: a folder on the server's machine, in peft's format."""

    lora_name: str = Field(min_length=1, max_length=200)
    lora_path: str = Field(min_length=1)
    base_model_name: str | None = None


class UnloadAdapterBody(Body):
    lora_name: str


class ReloadBody(Body):
    """path: on the server's machine; None for the one that the model has."""

    model: str
    path: str | None = Field(None, min_length=1)


class CandidateBody(Body):
    """share: of the model's requests. path: None for the candidate that there is."""

    model: str
    share: float = Field(ge=0, le=1)
    path: str | None = Field(None, min_length=1)


class OfCandidateBody(Body):
    """model: the one that has it."""

    model: str


def admin_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/load_lora_adapter", openapi_extra=takes(LoadAdapterBody))
    async def load_adapter(request: Request) -> Response:
        require_admin()
        body = await parse_body(state, request, LoadAdapterBody)
        await state.load_adapter(body.lora_name, Path(body.lora_path), body.base_model_name)
        return json_response({"loaded": body.lora_name})

    @routes.post("/v1/unload_lora_adapter", openapi_extra=takes(UnloadAdapterBody))
    async def unload_adapter(request: Request) -> Response:
        require_admin()
        body = await parse_body(state, request, UnloadAdapterBody)
        await state.unload_adapter(body.lora_name)
        return json_response({"unloaded": body.lora_name})

    @routes.post("/v1/reload_model", openapi_extra=takes(ReloadBody))
    async def reload_model(request: Request) -> Response:
        """Answers when the new version serves."""
        require_admin()
        body = await parse_body(state, request, ReloadBody)
        await state.versions.reload(body.model, body.path)
        return json_response({"reloaded": body.model})

    @routes.post("/v1/set_candidate", openapi_extra=takes(CandidateBody))
    async def set_candidate(request: Request) -> Response:
        require_admin()
        body = await parse_body(state, request, CandidateBody)
        await state.versions.set_candidate(body.model, body.path, body.share)
        return json_response({"candidate": candidate_name(body.model), "share": body.share})

    @routes.post("/v1/promote_candidate", openapi_extra=takes(OfCandidateBody))
    async def promote_candidate(request: Request) -> Response:
        require_admin()
        body = await parse_body(state, request, OfCandidateBody)
        await state.versions.promote(body.model)
        return json_response({"promoted": body.model})

    @routes.post("/v1/remove_candidate", openapi_extra=takes(OfCandidateBody))
    async def remove_candidate(request: Request) -> Response:
        require_admin()
        body = await parse_body(state, request, OfCandidateBody)
        await state.versions.remove(body.model)
        return json_response({"removed": candidate_name(body.model)})

    return routes
