"""The ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

import foveate
from foveate.serve.admin import admin_routes
from foveate.serve.bodies import body_schemas
from foveate.serve.control import control_routes
from foveate.serve.encoders import encoder_routes
from foveate.serve.errors import ApiError, error_response
from foveate.serve.gate import Gate
from foveate.serve.page import page_routes
from foveate.serve.routes import api_routes
from foveate.serve.state import ServerState


def create_app(state: ServerState) -> Gate:
    """For any ASGI server; models begin to load at its start-up."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.start()
        try:
            yield
        finally:
            state.stop()

    app = FastAPI(title="foveate", version=foveate.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    parts = (api_routes(state), encoder_routes(state), control_routes(state), page_routes(), admin_routes(state))
    for part in parts:  # not include_router, which looks through all routers anew for each request
        app.router.routes.extend(part.routes)

    async def api_error(request: Request, error: Any) -> Response:
        request.scope["foveate"]["error"] = error.code or error.message
        state.metrics.turned_away(error)
        return error_response(error)

    async def http_error(request: Request, error: Any) -> Response:
        found = ApiError(error.status_code, _sentence(request, error.status_code), code=None)
        response = error_response(found)
        response.headers.update(error.headers or {})
        return response

    async def any_error(request: Request, error: Exception) -> Response:
        """The client's part of it; the exception goes on to the gate, which logs it."""
        number = request.scope["foveate"]["id"]
        return error_response(
            ApiError(
                500, f"the server failed on this request ({number}); its log has the reason", code="internal_error"
            )
        )

    def description() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            found.setdefault("components", {}).setdefault("schemas", {}).update(body_schemas())
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = description  # type: ignore[method-assign]
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(Exception, any_error)
    app.add_exception_handler(HTTPException, http_error)
    return Gate(app, state)


def _sentence(request: Request, status: int) -> str:
    if status == 404:
        return f"there is nothing at {request.url.path[:200]}; /openapi.json lists what there is"
    if status == 405:
        return f"{request.url.path[:200]} does not take {request.method}"
    return f"the request was refused with {status}"
