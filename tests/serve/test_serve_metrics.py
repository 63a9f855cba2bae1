"""/metrics and the request log: everything exists at 0, every request is accounted for, no text gets out."""

from __future__ import annotations

import json
import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

import serve_toys
from foveate.serve.gate import JsonLines
from foveate.serve.metrics import FINISH_REASONS, REJECTIONS


def families(running) -> dict:
    return {family.name: family for family in text_string_to_metric_families(running.get("/metrics").text)}


def test_all_series_exist_at_the_first_scrape(folder):
    with serve_toys.serving(
        {"a": lambda: serve_toys.make_llm(folder), "b": lambda: serve_toys.make_llm(folder)}
    ) as running:
        found = families(running)
        for name in (
            "vllm:time_to_first_token_seconds",
            "vllm:inter_token_latency_seconds",
            "vllm:e2e_request_latency_seconds",
        ):
            assert {s.labels["model_name"] for s in found[name].samples} == {"a", "b"}
            assert all(s.value == 0 for s in found[name].samples if s.name.endswith("_count"))
        ended = [sample.labels for sample in found["vllm:request_success"].samples if sample.name.endswith("_total")]
        assert {(x["model_name"], x["finished_reason"]) for x in ended} == {
            (m, reason) for m in "ab" for reason in FINISH_REASONS
        }
        rejected = [
            sample.labels for sample in found["vllm:admission_rejections"].samples if sample.name.endswith("_total")
        ]
        assert {x["reason"] for x in rejected} == set(REJECTIONS)
        for name in (
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "foveate:model_ready",
        ):
            assert len(found[name].samples) == 2
        for name in (
            "prefill_time_seconds",
            "decode_time_seconds",
            "inference_time_seconds",
            "params_max_tokens",
            "params_n",
        ):
            assert f"vllm:request_{name}" in found  # panels of vLLM's boards
        assert {s.labels["block_size"] for s in found["vllm:cache_config_info"].samples} == {"4"}
        assert found["process_resident_memory_bytes"].samples[0].value > 1e6


def test_requests_are_accounted_for(folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}) as running:
        asked = {"prompt": "the quick brown fox jumps", "max_tokens": 9, "ignore_eos": True, "temperature": 0}
        used = [running.post("/v1/completions", **asked).json()["usage"] for _ in range(3)]
        running.post("/v1/completions", **asked, stream=True)
        running.post("/v1/completions", **asked, guided_choice=["a"])
        running.post("/v1/completions", prompt="x", max_tokens=-1)
        metric = running.metric
        label = {"model_name": "toy"}
        prompt = used[0]["prompt_tokens"]
        assert metric("vllm:prompt_tokens_total", **label) == 4 * prompt
        assert metric("vllm:generation_tokens_total", **label) == 4 * 9
        assert metric("vllm:request_success_total", **label, finished_reason="length") == 4
        assert (
            metric("vllm:time_to_first_token_seconds_count", **label)
            == metric("vllm:e2e_request_latency_seconds_count", **label)
            == 4
        )
        assert metric("vllm:inter_token_latency_seconds_count", **label) == 4 * 8
        assert metric("vllm:request_generation_tokens_sum", **label) == 36
        assert (
            metric("foveate:batch_samples_sum", **label) == 36
            and metric("vllm:request_params_max_tokens_sum", **label) == 36
        )
        parts = [
            metric(f"vllm:request_{part}_time_seconds_sum", **label) for part in ("prefill", "decode", "inference")
        ]
        assert parts[0] > 0 and parts[1] > 0 and parts[0] + parts[1] == pytest.approx(parts[2])
        if hasattr(running.engine.model, "kernel_seconds"):
            assert (
                0 < metric("foveate:kernel_seconds_sum", **label) < metric("foveate:engine_step_seconds_sum", **label)
            )
        assert metric("vllm:prefix_cache_queries_total", **label) == 4 * prompt
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in used)
        assert cached > 0 and metric("vllm:prefix_cache_hits_total", **label) >= cached
        assert metric("foveate:http_responses_total", route="/v1/completions", status="200") == 4
        assert metric("foveate:http_responses_total", route="/v1/completions", status="400") == 2
        assert metric("vllm:num_requests_running", **label) == 0 and metric("vllm:kv_cache_usage_perc", **label) == 0
        running.get("/no/such/path")
        assert metric("foveate:http_responses_total", route="none", status="404") == 1


@pytest.fixture
def lines():
    """Of the request log."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(JsonLines().format(record))

    logger, handler = logging.getLogger("foveate.serve.requests"), Keep()
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_the_log_has_texts_only_when_asked(folder, lines):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, log_texts=True) as running:
        text = running.text(prompt="lazy dog", max_tokens=3, ignore_eos=True, temperature=0)
        running.wait(lambda: len(lines) >= 1)
    [found] = (json.loads(line) for line in lines)
    assert found["prompts"] == ["lazy dog"] and found["replies"] == [text]


def test_the_log_has_ids_sizes_and_reasons_but_no_text(folder, lines):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, api_keys=("log-key-1",)) as running:
        running.client.post(
            running.url + "/v1/completions",
            json={"prompt": "lazy dog", "max_tokens": 3, "ignore_eos": True},
            headers={"x-request-id": "r-1"},
        )
        running.post("/v1/chat/completions", messages=[{"role": "user", "content": "lazy dog"}], temperature=9e9)
        running.get("/health")
        running.wait(lambda: len(lines) >= 2)
    first, second = (json.loads(line) for line in lines)
    assert (
        first["id"] == "r-1"
        and first["status"] == 200
        and first["path"] == "/v1/completions"
        and first["model"] == "toy"
    )
    assert first["completion_tokens"] == 3 and first["finish_reasons"] == ["length"] and first["seconds"] > 0
    assert first["first_token_seconds"] >= first["queue_seconds"] >= 0 and first["bytes"] > 10
    assert second["status"] == 400 and second["key"] == first["key"] and len(first["key"]) == 8
    assert not any("lazy" in line or "log-key" in line for line in lines)
