"""The static files of the page: what the browser may do with them, that they need no key, and what stands there when they are not built."""

from __future__ import annotations

import asyncio
import re

import pytest
from fastapi import FastAPI

import serve_toys
from foveate.serve.page import NOT_BUILT, PAGE_PATHS, STATIC, page_routes

built = pytest.mark.skipif(not (STATIC / "index.html").exists(), reason="the page has not been built: `make page`")


@built
def test_every_file_comes_with_a_policy_and_without_a_key(folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, api_keys=("page-key-1",)) as running:
        del running.client.headers["authorization"]
        for path in sorted(PAGE_PATHS):
            found = running.get(path)
            assert found.status_code == 200 and found.content, path
            policy = found.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "require-trusted-types-for" in policy
            assert found.headers["x-content-type-options"] == "nosniff"
            again = running.client.get(running.url + path, headers={"if-none-match": found.headers["etag"]})
            assert again.status_code == 304 and not again.content
        assert running.get("/v1/models").status_code == 401 and running.get("/metrics").status_code == 401
        assert running.get("/page/../app.py").status_code in (401, 404)


@built
def test_the_page_asks_nobody_else():
    """No address of another host, no inline script or style, which the policy would refuse."""
    for name in ("index.html", "dashboard.html"):
        text = (STATIC / name).read_text()
        addresses = re.findall(r'(?:src|href)="([^"]+)"', text)
        assert addresses and not [a for a in addresses if "//" in a]
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
    assert "url(" not in (STATIC / "chat.css").read_text() and "@import" not in (STATIC / "chat.css").read_text()
    assert "markdown-it" in (STATIC / "licenses.txt").read_text()


def test_a_server_without_the_files_says_what_to_run(tmp_path):
    app = FastAPI()
    app.include_router(page_routes(tmp_path))
    for path, status in {"/": 503, "/dashboard": 503, "/page/chat.js": 404}.items():
        sent: list[dict] = []

        async def send(message, sent=sent):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        asyncio.run(app(scope, None, send))
        assert sent[0]["status"] == status and sent[1]["body"].decode() == NOT_BUILT and "make page" in NOT_BUILT
