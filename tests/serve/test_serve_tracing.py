"""Spans of requests, in OpenTelemetry's own exporter to memory."""

from __future__ import annotations

import pytest

from foveate.serve.tracing import Tracing

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed")


@pytest.fixture
def spans(toy):
    """What has been exported, of the server with a provider of its own."""
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = sdk.TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    toy.state.tracing = Tracing(provider)
    yield exporter.get_finished_spans
    toy.state.tracing = None


def test_a_chat_is_a_span(toy, spans):
    body = {
        "messages": [{"role": "user", "content": "secret words"}],
        "max_tokens": 5,
        "seed": 1,
        "temperature": 0.5,
        "stop": ["zz"],
    }
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    found = toy.client.post(toy.url + "/v1/chat/completions", json=body, headers={"traceparent": parent}).json()
    toy.wait(spans)
    [span] = spans()
    assert span.name == "chat toy" and format(span.context.trace_id, "032x") == parent[3:35]
    assert format(span.parent.span_id, "016x") == parent[36:52] and span.start_time < span.end_time
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "toy", "gen_ai.request.max_tokens": 5, "gen_ai.request.seed": 1,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.stop_sequences": ("zz",), "gen_ai.response.id": found["id"],
        "gen_ai.usage.input_tokens": found["usage"]["prompt_tokens"], "gen_ai.usage.output_tokens": found["usage"]["completion_tokens"],
        "gen_ai.response.finish_reasons": (found["choices"][0]["finish_reason"],),
    }  # fmt: skip
    assert expected.items() <= dict(span.attributes).items()
    assert 0 < span.attributes["gen_ai.response.time_to_first_chunk"] < (span.end_time - span.start_time) / 1e9
    assert "secret" not in span.to_json()


def test_a_failure_says_why(toy, spans):
    step, toy.engine.step = toy.engine.step, lambda: 1 / 0
    try:
        toy.error(500, prompt="x", max_tokens=2)
    finally:
        toy.engine.step = step
    toy.wait(spans)
    [span] = spans()
    assert (
        span.name == "text_completion toy" and span.attributes["error.type"] == "engine_error" and not span.status.is_ok
    )


def test_an_endpoint_without_the_exporter(monkeypatch, folder):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match="pip install opentelemetry-sdk"):
        Tracing.from_environment()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    assert Tracing.from_environment() is None
