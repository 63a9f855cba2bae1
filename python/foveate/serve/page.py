"""The chat page at / and the dashboard: static files, built from web/ by `make page`, under a strict Content-Security-Policy."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

STATIC = Path(__file__).with_name("static")
_FILES = {
    "/": ("index.html", "text/html"),
    "/dashboard": ("dashboard.html", "text/html"),
    "/page/chat.js": ("chat.js", "text/javascript"),
    "/page/chat.css": ("chat.css", "text/css"),
    "/page/dashboard.js": ("dashboard.js", "text/javascript"),
    "/page/dashboard.css": ("dashboard.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    "/page/licenses.txt": ("licenses.txt", "text/plain"),
}
# They hold nothing of the server's, so they come without a key; the key is entered on them.
PAGE_PATHS = frozenset(_FILES)
NOT_BUILT = (
    "The chat page and the dashboard have not been built: run `make page`, which needs Node.js 18 or later with npm, "
    "and start the server again. The API is there as ever.\n"
)
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        # no text becomes markup or script but through the sanitiser
        "require-trusted-types-for 'script'; trusted-types dompurify"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}


def page_routes(static: Path = STATIC) -> APIRouter:
    """The files as they are now: a server that runs does not see a later build."""
    routes = APIRouter()
    for path, (name, kind) in _FILES.items():
        file = static / name
        routes.add_api_route(path, _route(file.read_bytes() if file.exists() else None, kind), include_in_schema=False)
    return routes


def _route(content: bytes | None, kind: str):  # type: ignore[no-untyped-def]  # FastAPI reads the inner signature
    tag = f'"{hashlib.sha256(content or b"").hexdigest()[:16]}"'

    async def answer(request: Request) -> Response:
        if content is None:
            return Response(NOT_BUILT, 503 if kind == "text/html" else 404, media_type="text/plain")
        headers = {**_HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return answer
