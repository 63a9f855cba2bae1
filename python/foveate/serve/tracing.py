"""OpenTelemetry spans of requests to causal models, with the attributes of its GenAI conventions and no text of prompts or replies."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import foveate
from foveate.generation.params import SamplingParams

if TYPE_CHECKING:
    from foveate.serve.answer import Answer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
# Sampling parameters as the conventions call them.
_PARAMETERS = {
    "max_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed",
    "frequency_penalty": "frequency_penalty", "presence_penalty": "presence_penalty",
}  # fmt: skip


class Tracing:
    """provider: of opentelemetry, whose spans are these."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("foveate.serve", foveate.__version__)

    @classmethod
    def from_environment(cls) -> Tracing | None:
        """None unless an endpoint is named as OpenTelemetry's variables name it. ImportError where one is and the SDK is missing."""
        if not any(os.environ.get(name) for name in _ENDPOINTS) or os.environ.get("OTEL_SDK_DISABLED") == "true":
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ImportError(
                f"an endpoint for traces is set, and {error.name} is not installed: pip install opentelemetry-sdk "
                f"opentelemetry-exporter-otlp-proto-http, or unset {' and '.join(_ENDPOINTS)}"
            ) from error
        name = os.environ.get("OTEL_SERVICE_NAME", "foveate")
        provider = TracerProvider(resource=Resource.create({"service.name": name}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def record(self, answer: Answer, scope: Any, began: float, error: BaseException | None) -> None:
        """A span from `began`, of time.time(), until now; a child of the one that the client's traceparent header names."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, Status, StatusCode

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        operation, model = answer.writer.operation, answer.served.name
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=propagate.extract(headers),
            kind=SpanKind.SERVER,
            start_time=int(began * 1e9),
        )
        span.set_attributes(_attributes(answer, operation, model))
        if error is not None:
            span.set_attribute("error.type", getattr(error, "code", None) or type(error).__name__)
            span.set_status(Status(StatusCode.ERROR))
        span.end(int(time.time() * 1e9))

    def stop(self) -> None:
        """Sends what has not been sent."""
        self._provider.shutdown()


def _attributes(answer: Answer, operation: str, model: str) -> dict[str, Any]:
    jobs = answer.call.jobs
    job = jobs[0]
    params: SamplingParams = job.params
    found: dict[str, Any] = {
        "gen_ai.operation.name": operation, "gen_ai.provider.name": "foveate", "gen_ai.request.model": model,
        "gen_ai.request.stream": answer.stream, "gen_ai.response.model": model, "gen_ai.response.id": job.id,
        "gen_ai.usage.input_tokens": answer.call.prompt_tokens, "gen_ai.usage.output_tokens": sum(j.generated for j in jobs),
    }  # fmt: skip
    for name, called in _PARAMETERS.items():
        if getattr(params, name) is not None:
            found[f"gen_ai.request.{called}"] = getattr(params, name)
    if params.n > 1:
        found["gen_ai.request.choice.count"] = params.n
    if params.stop_strings:
        found["gen_ai.request.stop_sequences"] = params.stop_strings
    outputs = [j.output for j in jobs if j.output is not None]
    reasons = [sample.finish_reason for output in outputs for sample in output.outputs if sample.finish_reason]
    if reasons:
        found["gen_ai.response.finish_reasons"] = reasons
    if outputs:
        found["gen_ai.usage.cache_read.input_tokens"] = sum(output.metrics.cached_tokens for output in outputs)
        first = outputs[0].metrics.first_token_time
        if first is not None:
            found["gen_ai.response.time_to_first_chunk"] = first - job.submitted
    return found
