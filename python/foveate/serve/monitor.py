"""What `foveate monitor` shows: a server's /metrics, /ready and /canary, read again and again, and what follows from two readings."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

SPAN = 60.0  # seconds that rates and percentiles are of
_TIMEOUT = 10.0


@dataclass
class Reading:
    """samples: by series name and labels. canary: the answer of /canary."""

    at: float
    samples: dict[str, list[tuple[dict[str, str], float]]]
    ready: dict[str, Any]
    canary: dict[str, Any]

    def sum(self, name: str, **labels: str) -> float | None:
        """Over the series that have these labels; None where there is none."""
        found = [value for has, value in self.samples.get(name, ()) if labels.items() <= has.items()]
        return sum(found) if found else None

    @property
    def models(self) -> list[str]:
        return [labels["model_name"] for labels, _ in self.samples.get("foveate:model_ready", ())]


class Source:
    """A server; key: for one that wants a key. RuntimeError, in a sentence, when it cannot be read."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        self._key = key
        # Proxies of the environment are for elsewhere.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def read(self) -> Reading:
        text = self._get("/metrics").decode()
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples.setdefault(sample.name, []).append((dict(sample.labels), float(sample.value)))
        if "foveate:model_ready" not in samples:
            raise RuntimeError(f"{self.url} is no server of `foveate serve`: its /metrics has no foveate:model_ready")
        return Reading(time.monotonic(), samples, json.loads(self._get("/ready")), json.loads(self._get("/canary")))

    def _get(self, path: str) -> bytes:
        headers = {} if self._key is None else {"authorization": f"Bearer {self._key}"}
        try:
            request = urllib.request.Request(self.url + path, headers=headers)
            with self._open(request, timeout=_TIMEOUT) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 503 and path == "/ready":  # it says what it waits for
                    return error.read()
                if error.code == 401:
                    raise RuntimeError(
                        f"{self.url} wants a key: give --api-key-file, or FOVEATE_API_KEY in the environment"
                    ) from None
                raise RuntimeError(f"{self.url}{path} answers with status {error.code}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise RuntimeError(f"{self.url}{path} does not answer: {reason}; is the server running?") from None


class History:
    """The readings of the last minute. since_start: counts and percentiles are of the server's whole life, rates of the readings."""

    def __init__(self, since_start: bool = False) -> None:
        self._readings: deque[Reading] = deque()
        self._since_start = since_start

    def add(self, reading: Reading) -> None:
        self._readings.append(reading)
        while len(self._readings) > 2 and reading.at - self._readings[1].at > SPAN:
            self._readings.popleft()

    @property
    def now(self) -> Reading:
        return self._readings[-1]

    def increase(self, name: str, **labels: str) -> float | None:
        """What has been added to a counter in the span; with one reading, since the server's start."""
        latest = self.now.sum(name, **labels)
        return latest if self._since_start or len(self._readings) == 1 else self._added(latest, name, labels)

    def _added(self, latest: float | None, name: str, labels: dict[str, str]) -> float | None:
        if latest is None:
            return None
        before = self._readings[0].sum(name, **labels) or 0.0
        return latest if latest < before else latest - before  # the server has been started again

    def rate(self, name: str, **labels: str) -> float | None:
        """A second; None with one reading."""
        span = self.now.at - self._readings[0].at
        found = self._added(self.now.sum(name, **labels), name, labels)
        return None if found is None or span <= 0 else found / span

    def quantile(self, name: str, q: float, **labels: str) -> float | None:
        """The quantile of a histogram's observations in the span, linear within a bucket; None without any."""
        bounds = {has["le"] for has, _ in self.now.samples.get(f"{name}_bucket", ())}
        counts = [(float(le), self.increase(f"{name}_bucket", le=le, **labels) or 0.0) for le in bounds]
        counts.sort()
        if not counts or not counts[-1][1]:
            return None
        rank, low, below = q * counts[-1][1], 0.0, 0.0
        for bound, count in counts:
            if count >= rank:
                return low if math.isinf(bound) else low + (bound - low) * (rank - below) / ((count - below) or 1.0)
            low, below = bound, count
        return low

    def facts(self, model: str) -> dict[str, Any]:
        """All numbers of a model, None where there is none yet; times in seconds, shares from 0 to 1."""
        label = {"model_name": model}

        def share(part: str, whole: str) -> float | None:
            all_of_it = self.increase(whole, **label)
            return (self.increase(part, **label) or 0.0) / all_of_it if all_of_it else None

        found: dict[str, Any] = {
            "tokens_per_s": self.rate("vllm:generation_tokens_total", **label),
            "prompt_tokens_per_s": self.rate("vllm:prompt_tokens_total", **label),
            "turned_away": self.increase("vllm:admission_rejections_total", **label),
            "prefix_hits": share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
            "schema_failures": self.increase("foveate:schema_failures_total", **label),
        }
        for name, (metric, q) in QUANTILES.items():
            found[name] = self.quantile(metric, q, **label)
        for name, metric in GAUGES.items():
            found[name] = self.now.sum(metric, **label)
        for reason in ("stop", "length", "abort", "error"):
            found[f"ended_{reason}"] = self.increase("vllm:request_success_total", **label, finished_reason=reason)
        for rating in ("up", "down"):
            found[f"thumbs_{rating}"] = self.now.sum("foveate:feedback_total", **label, rating=rating)
        return found


QUANTILES = {
    "first_token_p50": ("vllm:time_to_first_token_seconds", 0.5), "first_token_p95": ("vllm:time_to_first_token_seconds", 0.95),
    "between_tokens_p50": ("vllm:inter_token_latency_seconds", 0.5), "between_tokens_p95": ("vllm:inter_token_latency_seconds", 0.95),
    "whole_reply_p95": ("vllm:e2e_request_latency_seconds", 0.95), "queue_p95": ("vllm:request_queue_time_seconds", 0.95),
    "step_p95": ("foveate:engine_step_seconds", 0.95),
}  # fmt: skip
GAUGES = {
    "running": "vllm:num_requests_running", "waiting": "vllm:num_requests_waiting", "cache_used": "vllm:kv_cache_usage_perc",
    "stalled": "foveate:engine_stalled_seconds", "failed_steps": "foveate:engine_failed_steps",
    "logprob": "foveate:reply_logprob_mean", "entropy": "foveate:reply_entropy_mean", "by_length": "foveate:reply_length_share",
    "empty": "foveate:reply_empty_share", "repeated": "foveate:reply_repeated_share",
    "prompt_length_psi": "foveate:prompt_length_psi", "prompt_script_psi": "foveate:prompt_script_psi",
}  # fmt: skip


def report(history: History, url: str) -> dict[str, Any]:
    """All of it, as `--json` prints it."""
    now = history.now
    return {
        "url": url,
        "ready": now.ready,
        "canary": {"status": now.canary["status"], "rounds": now.canary.get("rounds", 0)},
        "memory_bytes": now.sum("process_resident_memory_bytes"),
        "models": {model: history.facts(model) for model in now.models},
    }
