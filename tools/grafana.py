"""Writes deploy/grafana/foveate.json, the Grafana dashboard of `foveate serve`: tools/grafana.py [--check]"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "deploy" / "grafana" / "foveate.json"
_BY_MODEL = '{model_name=~"$model"}'
_HEIGHT, _WIDTH, _PER_ROW = 8, 8, 3


def _rate(name: str, by: str = "model_name") -> list[tuple[str, str]]:
    return [(f"sum by ({by}) (rate({name}{_BY_MODEL}[$__rate_interval]))", f"{{{{{by}}}}}")]


def _gauge(*names: str) -> list[tuple[str, str]]:
    return [(f"{name}{_BY_MODEL}", f"{name.split(':')[1]} {{{{model_name}}}}") for name in names]


def _quantiles(name: str) -> list[tuple[str, str]]:
    rate = f"sum by (le) (rate({name}_bucket{_BY_MODEL}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {rate})", f"p{100 * q:.0f}") for q in (0.5, 0.95, 0.99)]


# heading of a row, then (title, unit, [(expression, legend)])
ROWS: tuple[tuple[str, tuple[tuple[str, str, list[tuple[str, str]]], ...]], ...] = (
    ("Load", (
        ("Generated tokens", "short", _rate("vllm:generation_tokens_total")),
        ("Prompt tokens", "short", _rate("vllm:prompt_tokens_total")),
        ("Running and waiting", "short", _gauge("vllm:num_requests_running", "vllm:num_requests_waiting")),
        ("Ends by reason", "reqps", _rate("vllm:request_success_total", "finished_reason")),
        ("Turned away", "reqps", _rate("vllm:admission_rejections_total", "reason")),
        ("Tokens by key", "short", [("sum by (key) (rate(foveate:key_tokens_total[$__rate_interval]))", "{{key}}")]),
        ("Responses by status", "reqps", [("sum by (status) (rate(foveate:http_responses_total[$__rate_interval]))", "{{status}}")]),
    )),
    ("Times", (
        ("First token", "s", _quantiles("vllm:time_to_first_token_seconds")),
        ("Between tokens", "s", _quantiles("vllm:inter_token_latency_seconds")),
        ("End to end", "s", _quantiles("vllm:e2e_request_latency_seconds")),
        ("In the queue", "s", _quantiles("vllm:request_queue_time_seconds")),
        ("Step of the engine", "s", _quantiles("foveate:engine_step_seconds")),
        ("Age of the running step", "s", _gauge("foveate:engine_stalled_seconds")),
    )),
    ("Engine", (
        ("Cache in use", "percentunit", _gauge("vllm:kv_cache_usage_perc")),
        ("Prompt tokens found in the cache", "percentunit", [(
            f"sum by (model_name) (rate(vllm:prefix_cache_hits_total{_BY_MODEL}[$__rate_interval])) / "
            f"sum by (model_name) (rate(vllm:prefix_cache_queries_total{_BY_MODEL}[$__rate_interval]))", "{{model_name}}",
        )]),
        ("Memory of the process", "bytes", [("process_resident_memory_bytes", "{{instance}}")]),
        ("Preemptions, failed steps, restarts", "short", _gauge(
            "vllm:num_preemptions", "foveate:engine_failed_steps", "foveate:engine_restarts",
        )),
        ("Length of prompts", "short", _quantiles("vllm:request_prompt_tokens")),
        ("Length of replies", "short", _quantiles("vllm:request_generation_tokens")),
    )),
    ("Quality", (
        ("Canary", "short", _rate("foveate:canary_runs_total", "result")),
        ("Log-probability of a token", "short", _gauge("foveate:reply_logprob_mean")),
        ("Entropy of a token", "short", _gauge("foveate:reply_entropy_mean")),
        ("Replies", "percentunit", _gauge("foveate:reply_length_share", "foveate:reply_empty_share", "foveate:reply_repeated_share")),
        ("Shift of prompts (PSI)", "short", _gauge("foveate:prompt_length_psi", "foveate:prompt_script_psi")),
        ("Thumbs", "short", _rate("foveate:feedback_total", "rating")),
        ("Schemas that fail", "reqps", _rate("foveate:schema_failures_total", "reason")),
    )),
)  # fmt: skip
_SOURCE = {"type": "prometheus", "uid": "${source}"}


def dashboard() -> dict[str, Any]:
    """As Grafana imports it: a row for each heading, three panels beside each other."""
    panels: list[dict[str, Any]] = []
    y = 0
    for heading, entries in ROWS:
        panels.append({"type": "row", "title": heading, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}, "panels": []})
        y += 1
        for i, entry in enumerate(entries):
            x, row = i % _PER_ROW * _WIDTH, i // _PER_ROW
            panels.append(_panel(*entry, {"h": _HEIGHT, "w": _WIDTH, "x": x, "y": y + row * _HEIGHT}))
        y += -(-len(entries) // _PER_ROW) * _HEIGHT
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    variables = [
        {"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"},
        {
            "name": "model", "label": "Model", "type": "query", "datasource": _SOURCE, "includeAll": True, "multi": True,
            "query": "label_values(foveate:model_ready, model_name)", "refresh": 2, "current": {"text": "All", "value": "$__all"},
        },
    ]  # fmt: skip
    return {
        "title": "foveate serve", "uid": "foveate-serve", "schemaVersion": 39, "refresh": "10s", "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"}, "templating": {"list": variables}, "panels": panels, "tags": ["foveate"],
    }  # fmt: skip


def _panel(title: str, unit: str, queries: list[tuple[str, str]], place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(queries)
    ]
    style = {
        "unit": unit,
        "min": None if title.startswith("Log") else 0,
        "custom": {"fillOpacity": 8, "showPoints": "never"},
    }
    return {
        "type": "timeseries", "title": title, "datasource": _SOURCE, "gridPos": place, "targets": targets,
        "fieldConfig": {"defaults": style, "overrides": []}, "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    text = json.dumps(dashboard(), indent=1) + "\n"
    if not parser.parse_args().check:
        FILE.write_text(text)
    elif not FILE.exists() or FILE.read_text() != text:
        print(f"{FILE} is not what tools/grafana.py writes: run it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
