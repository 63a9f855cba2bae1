"""The routes of those who run the server: probes, metrics, version, canary, quality; and feedback on answers."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

import foveate
from foveate.serve.errors import json_response
from foveate.serve.protocol import Body
from foveate.serve.state import ServerState


class FeedbackBody(Body):
    id: str
    rating: Literal["up", "down"]


_FEEDBACK = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": FeedbackBody.model_json_schema()}}}
}


def control_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    async def health() -> Response:
        """200 while this process is worth keeping: also when it loads, drains, or is busy."""
        hanging = state.hanging()
        found: dict[str, Any] = {
            "status": "hanging" if hanging else "ok",
            "uptime_seconds": round(time.time() - state.started, 3),
        }
        if hanging:
            found["hanging"] = hanging
        if state.watchdog.restarts:
            found["engine_restarts"] = dict(state.watchdog.restarts)
        return json_response(found, 503 if hanging else 200)

    @routes.get("/ready")
    async def ready() -> Response:
        """200 when requests are answered now; else 503 and what is waited for."""
        good, found = state.readiness()
        return json_response(found, 200 if good else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/version")
    async def version() -> Response:
        return json_response({"version": foveate.__version__})

    @routes.get("/load")
    async def load() -> Response:
        """vLLM's: requests that are being answered."""
        return json_response({"server_load": state.in_flight})

    @routes.get("/canary")
    async def canary() -> Response:
        return json_response({"status": "off", "prompts": []} if state.canary is None else state.canary.report())

    @routes.get("/quality")
    async def quality() -> Response:
        """By model: how its last replies were, and the reference of its prompts, which --quality-reference takes."""
        return json_response(state.metrics.quality.report())

    @routes.post("/v1/feedback", openapi_extra=_FEEDBACK)
    async def feedback(request: Request) -> Response:
        """{"id": that of an answer, "rating": "up" or "down"}: one for each answer."""
        body = FeedbackBody.parse(request.scope["foveate_body"])
        model = state.metrics.quality.rate(body.id)
        state.metrics.feedback.labels(model, body.rating).inc()
        return json_response({"id": body.id, "model": model, "rating": body.rating})

    return routes
