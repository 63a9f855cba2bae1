"""`foveate monitor`: the numbers are those of /metrics, and a server that cannot be read is a sentence."""

from __future__ import annotations

import json
import socket

import pytest

import serve_toys
from foveate.cli import main
from foveate.serve.monitor import GAUGES, QUANTILES, History, Reading, Source


@pytest.fixture
def used(folder):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, api_keys=("monitor-key",)) as running:
        for seed in range(3):
            running.text(prompt="the fox", max_tokens=8, ignore_eos=True, seed=seed)
        yield running


def test_once_as_json_and_as_a_table(used, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    keys = tmp_path / "keys"
    keys.write_text("monitor-key\n")
    assert main(["monitor", used.url, "--once", "--json", "--api-key-file", str(keys)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ready"]["status"] == "ready" and found["canary"]["status"] == "off" and found["memory_bytes"] > 1e6
    facts = found["models"]["toy"]
    assert (
        facts["running"] == facts["waiting"] == 0
        and facts["by_length"] == 1
        and facts["ended_length"] == 3
        and facts["thumbs_up"] == 0
    )
    monkeypatch.setenv("FOVEATE_API_KEY", "monitor-key")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["monitor", used.url, "--once"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("toy", "first token p95", "ended by length", "100.0 %", "ready"))


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_it_goes_on_until_ctrl_c(more, used, capsys, monkeypatch):
    """Three readings, the second of a server that does not answer, which the screen outlives."""
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            raise KeyboardInterrupt

    read, count = Source.read, []

    def sometimes(source: Source) -> Reading:
        count.append(0)
        if len(count) == 2 and not more:
            raise RuntimeError("the server is away")
        return read(source)

    monkeypatch.setattr("time.sleep", wait)
    monkeypatch.setattr(Source, "read", sometimes)
    monkeypatch.setenv("FOVEATE_API_KEY", "monitor-key")
    assert main(["monitor", used.url, "--every", "0.5", *more]) == 130
    assert waits == [0.5] * 3
    shown = capsys.readouterr().out
    if more:
        assert [json.loads(line)["models"]["toy"]["running"] for line in shown.splitlines()] == [0, 0, 0]


def test_rates_and_percentiles_are_of_the_span(used):
    source, history = Source(used.url.removeprefix("http://"), "monitor-key"), History()
    history.add(source.read())
    assert history.increase("vllm:generation_tokens_total", model_name="toy") == 24  # since the start
    used.text(prompt="the fox", max_tokens=5, ignore_eos=True)
    history.add(source.read())
    assert history.increase("vllm:generation_tokens_total", model_name="toy") == 5
    assert history.rate("vllm:generation_tokens_total", model_name="toy") > 0
    facts = history.facts("toy")
    assert 0 < facts["first_token_p50"] <= facts["first_token_p95"] and facts["ended_length"] == 1
    names = {*GAUGES.values(), *(f"{metric}_bucket" for metric, _ in QUANTILES.values())}
    assert names <= set(history.now.samples)


def test_a_percentile_is_linear_within_its_bucket():
    def reading(at: float, *counts: float) -> Reading:
        rows = [({"le": le}, count) for le, count in zip(("0.1", "0.2", "+Inf"), counts)]
        return Reading(at, {"x_bucket": rows}, {}, {})

    history = History()
    history.add(reading(0, 5, 5, 5))
    history.add(reading(10, 7, 9, 9))
    assert history.quantile("x", 0.5) == pytest.approx(0.1)
    assert history.quantile("x", 0.75) == pytest.approx(0.15)
    history.add(reading(200, 1, 1, 1))  # started again, and more than a minute later
    assert history.increase("x_bucket", le="0.1") == 1
    history.add(reading(300, 1, 1, 1))
    assert history.quantile("x", 0.5) is None


def test_what_cannot_be_read(used, capsys, tmp_path):
    digests = tmp_path / "keys"
    digests.write_text('# the server\'s\n{"name": "a"}\n')
    assert main(["monitor", used.url, "--once", "--api-key-file", str(digests)]) == 1
    assert "digests" in capsys.readouterr().err
    assert main(["monitor", used.url, "--once"]) == 1
    assert "wants a key" in capsys.readouterr().err
    with socket.socket() as taken:  # nobody listens
        taken.bind(("127.0.0.1", 0))
        assert main(["monitor", f"127.0.0.1:{taken.getsockname()[1]}", "--once"]) == 1
    assert "is the server running?" in capsys.readouterr().err
    assert main(["monitor", "--every", "0"]) == 2
