"""What /metrics says: vLLM's names where the meaning is the same, so that its dashboards work, and foveate's beside them."""

from __future__ import annotations

import os
import time
from collections import Counter as Counts
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from foveate.serve.errors import ApiError
from foveate.serve.jobs import Call, Job
from foveate.serve.quality import EXPLAINED, RATINGS, Quality
from foveate.serve.served import ServedModel
from foveate.serve.token_times import TokenTimes
from foveate.serve.worker import facts

FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "rate_limited", "loading", "draining")
SCHEMA_FAILURES = ("refused", "unfinished")
# vLLM's bounds with finer ones below: a small model on a CPU takes some milliseconds for a token.
_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """One registry for each server. All series exist, at 0, as soon as their model is known."""

    def __init__(self, models: Iterable[ServedModel], keys: Iterable[str] = (), quality: Quality | None = None) -> None:
        self.registry = CollectorRegistry()
        self.quality = quality or Quality()
        self._models = list(models)
        model = ["model_name"]

        def counter(name: str, text: str, labels: list[str] = model) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(name, text, model, buckets=_SECONDS, registry=self.registry)

        def counts(name: str, text: str) -> Histogram:
            return Histogram(name, text, model, buckets=_COUNTS, registry=self.registry)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests that have begun.")
        self.generation_tokens = counter("vllm:generation_tokens", "Generated tokens.")
        self.cached_tokens = counter("vllm:prefix_cache_hits", "Prompt tokens that the prefix cache had.")
        self.queried_tokens = counter(
            "vllm:prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache."
        )
        self.success = counter(
            "vllm:request_success", "Prompts that have ended, by reason.", [*model, "finished_reason"]
        )
        self.rejections = counter("vllm:admission_rejections", "Requests that were turned away.", [*model, "reason"])
        self.first_token = seconds("vllm:time_to_first_token_seconds", "From submission to the first token.")
        self.between_tokens = TokenTimes("vllm:inter_token_latency_seconds", "Between tokens of a request.", _SECONDS)
        self.registry.register(self.between_tokens)
        self.per_token = seconds(
            "vllm:request_time_per_output_token_seconds", "Mean over a request, after its first token."
        )
        self.end_to_end = seconds("vllm:e2e_request_latency_seconds", "From submission to the end.")
        self.queue_time = seconds("vllm:request_queue_time_seconds", "From submission to the first step.")
        self.request_prompt = counts("vllm:request_prompt_tokens", "Prompt tokens of a request.")
        self.request_generation = counts("vllm:request_generation_tokens", "Generated tokens of a request.")
        self.step_seconds = seconds("foveate:engine_step_seconds", "The step that brought an output.")
        self.kernel_seconds = seconds("foveate:kernel_seconds", "Of that step, in the native layers; CPUs only.")
        self.batch = counts("foveate:batch_samples", "Samples that got a token in that step.")
        self.prefill_time = seconds("vllm:request_prefill_time_seconds", "From the first step to the first token.")
        self.decode_time = seconds("vllm:request_decode_time_seconds", "From the first token to the end.")
        self.inference_time = seconds("vllm:request_inference_time_seconds", "From the first step to the end.")
        self.most_tokens = counts("vllm:request_params_max_tokens", "What requests allow.")
        self.longest = counts("vllm:request_max_num_generation_tokens", "Tokens of a request's longest sample.")
        self.samples = counts("vllm:request_params_n", "Samples that requests ask for.")
        self.responses = counter("foveate:http_responses", "Responses by status and route.", ["route", "status"])
        self.canary_runs = counter(
            "foveate:canary_runs", "Golden prompts that were run, by result.", [*model, "result"]
        )
        self.key_requests = counter("foveate:key_requests", "Requests of a key that have ended.", ["key"])
        self.key_tokens = counter("foveate:key_tokens", "Tokens of a key's requests.", ["key", "kind"])
        for key in keys:
            self.key_requests.labels(key)
            for kind in ("prompt", "generation"):
                self.key_tokens.labels(key, kind)
        self.schema_failures = counter(
            "foveate:schema_failures",
            "Schemas that were refused, and replies that ended within one.",
            [*model, "reason"],
        )
        self.feedback = counter("foveate:feedback", "Answers that were rated.", [*model, "rating"])
        self.guard_findings = counter(
            "foveate:guard_findings", "What rules of the guard have found.", [*model, "side", "rule", "action"]
        )
        self._guard_labels: list[tuple[str, str, str]] = []
        for served in self._models:
            self._make_all(served.name)
        self.registry.register(_Gauges(self._models, self.quality))

    def _make_all(self, name: str) -> None:
        plain = [self.prompt_tokens, self.generation_tokens, self.cached_tokens, self.queried_tokens]
        timed = [
            self.first_token, self.per_token, self.end_to_end, self.queue_time, self.request_prompt, self.request_generation,
            self.step_seconds, self.kernel_seconds, self.batch, self.prefill_time, self.decode_time, self.inference_time, self.most_tokens,
            self.longest, self.samples,
        ]  # fmt: skip
        self.between_tokens.add(name)
        for metric in [*plain, *timed]:
            metric.labels(name)
        for reason in FINISH_REASONS:
            self.success.labels(name, reason)
        for reason in REJECTIONS:
            self.rejections.labels(name, reason)
        for result in ("same", "drift", "failed"):
            self.canary_runs.labels(name, result)
        for reason in SCHEMA_FAILURES:
            self.schema_failures.labels(name, reason)
        for rating in RATINGS:
            self.feedback.labels(name, rating)
        self._make_guard(name)

    def guards(self, rules: Iterable[Any]) -> None:
        """The rules of the guard, whose counts begin at 0."""
        self._guard_labels = [(side, rule.name, rule.action) for rule in rules for side in rule.on]
        for served in self._models:
            self._make_guard(served.name)

    def _make_guard(self, name: str) -> None:
        for labels in self._guard_labels:
            self.guard_findings.labels(name, *labels)

    def add(self, served: ServedModel) -> None:
        """One that is served from now on."""
        self._models.append(served)
        self._make_all(served.name)

    def remove(self, served: ServedModel) -> None:
        """Its counters stay, as Prometheus wants it; its gauges go."""
        if served in self._models:
            self._models.remove(served)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def on_outputs(self, served: ServedModel, jobs: list[Job]) -> None:
        """In the event loop, after each step."""
        name, now = served.name, time.perf_counter()
        generated: Counts[str] = Counts()  # by model; a counter of Prometheus costs more than all else of a token
        if served.worker is not None:
            step = served.worker.last_step
            self.step_seconds.labels(name).observe(step.seconds)
            self.batch.labels(name).observe(step.samples)
            if step.kernel_seconds is not None:
                self.kernel_seconds.labels(name).observe(step.kernel_seconds)
        for job in jobs:
            if job.internal:
                continue
            model = job.model or name
            if model != name and job.counted_at is None:  # an adapter, whose tokenizer is its base's
                self.quality.of(model).prompts.share_scripts(self.quality.of(name).prompts)
            if job.output is not None:
                generated[model] += self._count(model, job, now)
            if job.error is not None and not job.accounted:
                job.accounted = True
                self.success.labels(model, "error").inc()
        for model, tokens in generated.items():
            self.generation_tokens.labels(model).inc(tokens)

    def _count(self, name: str, job: Job, now: float) -> int:
        """The new tokens; each step by its own time, as the event loop may see several at once."""
        before = job.counted
        while job.progress:
            at, total = job.progress.popleft()
            new = total - job.counted
            if new > 0:
                if job.counted_at is None:
                    self._began(name, job, at)
                else:
                    self.between_tokens.observe(name, (at - job.counted_at) / new, new)
                job.counted, job.counted_at = total, at
        if job.latest.finished and not job.accounted:  # a later step's output may be here before an earlier one's call
            job.accounted = True
            self._ended(name, job, now)
        return job.counted - before

    def _began(self, name: str, job: Job, now: float) -> None:
        self.quality.began(name, job)
        self.first_token.labels(name).observe(now - job.submitted)
        self.queue_time.labels(name).observe(max(0.0, (job.started or now) - job.submitted))
        self.prompt_tokens.labels(name).inc(len(job.tokens))
        self.request_prompt.labels(name).observe(len(job.tokens))
        self.samples.labels(name).observe(job.params.n)
        if job.params.max_tokens is not None:
            self.most_tokens.labels(name).observe(job.params.max_tokens)
        if job.params.prompt_logprobs is None:
            self.queried_tokens.labels(name).inc(len(job.tokens))
            self.cached_tokens.labels(name).inc(job.latest.metrics.cached_tokens)

    def _ended(self, name: str, job: Job, now: float) -> None:
        output = job.latest
        reasons = {sample.finish_reason for sample in output.outputs}
        self.success.labels(name, next((r for r in ("abort", "length") if r in reasons), "stop")).inc()
        self.end_to_end.labels(name).observe(now - job.submitted)
        self.request_generation.labels(name).observe(job.generated)
        self.longest.labels(name).observe(max(len(sample.token_ids) for sample in output.outputs))
        self.quality.ended(name, job)
        if (job.params.json_schema or job.params.regex) is not None and "length" in reasons:
            self.schema_failures.labels(name, "unfinished").inc()
        metrics = output.metrics
        if job.started is not None and metrics.first_token_time is not None and metrics.finished_time is not None:
            self.prefill_time.labels(name).observe(metrics.first_token_time - job.started)
            self.decode_time.labels(name).observe(metrics.finished_time - metrics.first_token_time)
            self.inference_time.labels(name).observe(metrics.finished_time - job.started)
        if job.generated > 1 and metrics.first_token_time is not None and metrics.finished_time is not None:
            self.per_token.labels(name).observe(
                (metrics.finished_time - metrics.first_token_time) / (job.generated - 1)
            )

    def used(self, key: str, call: Call) -> None:
        """The tokens of a request that has ended; key: "" where the server has no keys."""
        self.charge(
            key,
            sum(len(job.tokens) for job in call.jobs if job.output is not None),
            sum(job.generated for job in call.jobs),
        )

    def charge(self, key: str, prompt: int, generated: int = 0) -> None:
        if key:
            self.key_requests.labels(key).inc()
            self.key_tokens.labels(key, "prompt").inc(prompt)
            self.key_tokens.labels(key, "generation").inc(generated)

    def turned_away(self, error: ApiError) -> None:
        if error.code in REJECTIONS and error.model:
            self.rejections.labels(error.model, error.code).inc()

    def aborted(self, served: ServedModel, jobs: list[Job]) -> None:
        for job in jobs:
            if not job.accounted:
                job.accounted = True
                self.success.labels(served.name, "abort").inc()


class _Gauges(Collector):
    """Read from the engines when somebody asks."""

    def __init__(self, models: list[ServedModel], quality: Quality) -> None:
        self._models, self._quality = models, quality

    def collect(self) -> Iterator[Metric]:
        rows: dict[str, tuple[str, list[tuple[str, float]]]] = {
            "vllm:num_requests_running": ("Samples that run.", []),
            "vllm:num_requests_waiting": ("Samples that wait.", []),
            "vllm:kv_cache_usage_perc": ("Pages of the cache that sequences hold, from 0 to 1.", []),
            "vllm:num_preemptions": ("Samples that gave their pages back, since the start.", []),
            "foveate:cached_pages": ("Pages that only the prefix cache holds.", []),
            "foveate:model_ready": ("1 when the model is loaded.", []),
            "foveate:model_load_seconds": ("How long loading took.", []),
            "foveate:engine_stalled_seconds": ("Age of the last step, 0 when there is nothing to do.", []),
            "foveate:engine_failed_steps": ("Steps that raised, since the start.", []),
            "foveate:engine_restarts": ("Engines that hung and were restarted, since the start.", []),
            **{f"foveate:{name}": (text, []) for name, text in EXPLAINED.items()},
        }
        for served in self._models:
            numbers = {f"foveate:{name}": value for name, value in self._quality.of(served.name).numbers().items()}
            for name, value in (_gauges(served) | numbers).items():
                rows[name][1].append((served.name, value))
        for name, (text, values) in rows.items():
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            for model, value in values:
                family.add_metric([model], value)
            yield family
        yield from self._of_engines()
        memory = GaugeMetricFamily("process_resident_memory_bytes", "Of this process.")
        memory.add_metric([], resident_bytes())
        yield memory

    def _of_engines(self) -> Iterator[Metric]:
        """What routers of clusters read: the size of the cache, and which adapters run or wait."""
        cache = GaugeMetricFamily(
            "vllm:cache_config_info", "1; the pages are labels.", labels=["model_name", "block_size", "num_gpu_blocks"]
        )
        labels = ["model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        adapters = GaugeMetricFamily("vllm:lora_requests_info", "The time; which adapters run and wait.", labels=labels)
        for served in self._models:
            if served.worker is None or served.adapter is not None:
                continue
            engine = served.worker.engine
            cache.add_metric([served.name, str(engine.cache.page_size), str(engine.num_pages)], 1)
            names = [_adapters(samples) for samples in (engine.scheduler.running, engine.scheduler.waiting)]
            adapters.add_metric([served.name, str(len(engine.adapters.names)), *names], time.time())
        yield cache
        yield adapters


def _adapters(samples: Iterable[Any]) -> str:
    found = (sample.request.adapter for sample in list(samples))
    return ",".join(sorted({adapter.name for adapter in found if adapter is not None}))


def _gauges(served: ServedModel) -> dict[str, float]:
    found: dict[str, float] = {
        "foveate:model_ready": float(served.state == "ready"),
        "foveate:model_load_seconds": served.load_seconds,
    }
    worker = None if served.adapter is not None else served.worker  # the engine is its base's
    now: dict[str, Any] = {} if worker is None else facts(worker.engine)
    used = now.get("pages", 0) - now.get("free_pages", 0) - now.get("evictable_pages", 0)
    return found | {
        "vllm:num_requests_running": now.get("running", 0),
        "vllm:num_requests_waiting": now.get("waiting", 0),
        "vllm:kv_cache_usage_perc": max(0, used) / now["pages"] if now else 0.0,
        "vllm:num_preemptions": 0 if worker is None else worker.engine.stats.preemptions,
        "foveate:cached_pages": now.get("evictable_pages", 0),
        "foveate:engine_stalled_seconds": 0.0 if worker is None else worker.stalled_for,
        "foveate:engine_failed_steps": 0 if worker is None else worker.failed_steps,
        "foveate:engine_restarts": 0 if worker is None else worker.restarts,
    }


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
