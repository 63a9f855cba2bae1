"""OpenAI's client for Node.js: whole and streamed answers, calls of tools, embeddings, errors, a stream that is left."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import client_toys
import serve_toys

FOLDER = Path(__file__).parent / "node_client"
client_toys.needed(shutil.which("node") is not None and (FOLDER / "node_modules").is_dir(), "openai for Node.js")
pytestmark = pytest.mark.clients


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with client_toys.serving(tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.fixture(scope="module")
def found(server):
    done = subprocess.run(
        ["node", str(FOLDER / "client.mjs"), server.url, json.dumps(serve_toys.TOOL)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_streams_are_the_whole(found):
    assert found["models"] == ["toy", "embed", "rank"]
    assert found["deltas"] == found["content"] and found["streamedUsage"] == found["usage"]
    assert found["completionDeltas"] == found["completion"]
    assert found["responseDeltas"] == found["response"]


def test_calls_parse(found):
    assert found["call"]["name"] == "get" and json.loads(found["call"]["arguments"])["city"] in ("Rome", "Oslo")
    assert {name: found["streamedCall"][name] for name in ("name", "arguments")} == found["call"]


def test_embeddings_in_both_formats(found):
    assert len(found["embedding"]) == 32 and found["embedding"] == pytest.approx(found["floats"], abs=1e-6)


def test_errors_are_its_classes(found):
    assert (found["unknown"]["kind"], found["unknown"]["code"]) == ("NotFoundError", "model_not_found")
    assert (found["refused"]["kind"], found["refused"]["param"]) == ("BadRequestError", "temperature")
    assert found["long"]["code"] == "context_length_exceeded" and "9000" in found["long"]["message"]


def test_the_stream_that_was_left_is_aborted(server, found):
    assert found["left"].startswith("cmpl-")

    def aborted():
        return server.metric("vllm:request_success_total", model_name="toy", finished_reason="abort")

    server.wait(lambda: server.state.in_flight == 0, 60)
    server.wait(server.idle, 60)
    assert aborted() == 1
