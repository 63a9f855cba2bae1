"""What /metrics says of the replies themselves: exact on toys, an alarm when prompts change, thumbs once, no text anywhere."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import generation_toys as toys
import serve_toys
from foveate.serve.prompt_shift import SCRIPTS, PromptShift, script_of, script_table, stability_index
from foveate.serve.quality import EXPLAINED, WINDOW, Quality, answer_id, read_references, repeats_itself
from foveate.serve.token_probe import TokenProbe, TokenWindow


@pytest.fixture
def watched(folder):
    """A server that looks at every token."""
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}) as running:
        running.wait(lambda: running.engine.on_chosen is not None)
        running.engine.on_chosen._every, running.engine.on_chosen._rows = 1, 64
        yield running


def test_log_probability_and_entropy_are_those_of_the_answers(watched):
    """The mean over all tokens of two answers; entropy from the whole distribution, which top_logprobs=all gives."""
    asked = {"prompt": "the quick brown fox", "max_tokens": 12, "ignore_eos": True, "logprobs": 5, "temperature": 0.8}
    own: list[float] = []
    for seed in (1, 2):
        own += watched.post("/v1/completions", **asked, seed=seed).json()["choices"][0]["logprobs"]["token_logprobs"]
    label = {"model_name": "toy"}
    assert watched.metric("foveate:reply_probed_tokens", **label) == len(own) == 24
    assert watched.metric("foveate:reply_logprob_mean", **label) == pytest.approx(sum(own) / len(own), abs=1e-5)
    assert 0 < watched.metric("foveate:reply_entropy_mean", **label) < 6


def asked(*names: str, adapter: SimpleNamespace | None = None) -> list[SimpleNamespace]:
    return [SimpleNamespace(id=name, adapter=adapter) for name in names]


def test_an_adapter_has_numbers_of_its_own(folder, tmp_path):
    load = {"toy": lambda: serve_toys.make_llm(folder)}
    with serve_toys.serving(load, adapters={"a": toys.adapter(tmp_path, 1)}) as running:
        running.engine.on_chosen._every = 1
        for model, count in (("a", 7), ("toy", 3)):
            running.text(model=model, prompt="the fox", max_tokens=count, ignore_eos=True)
            assert running.metric("foveate:reply_probed_tokens", model_name=model) == count
            assert running.metric("foveate:reply_window", model_name=model) == 1
        prompts = [running.state.metrics.quality.of(name).prompts for name in ("a", "toy")]
        assert prompts[0]._table is prompts[1]._table is not None


def test_the_probe_looks_at_a_part_and_keeps_a_window():
    window, adapter = TokenWindow(kept=6), TokenWindow()
    probe = TokenProbe(lambda name: window if name is None else adapter, every=4, rows=2)
    logits = torch.zeros(3, 8)
    for _ in range(8):
        probe(logits, [0, 1, 2], [0, -1, 5], asked("a", "b", "canary-1"))
    found = window.means()
    assert found.tokens == 2  # twice, and of the three rows one is of nobody and one the server's own
    assert found.logprob == pytest.approx(-torch.log(torch.tensor(8.0)).item())
    assert found.entropy == pytest.approx(-found.logprob)
    for _ in range(40):
        probe(logits, [0, 1, 2], [0, 1, 2], asked("a", "b", "c"))
    assert window.means().tokens == 6 and adapter.means() == (0.0, 0.0, 0)
    one = torch.full((1, 4), -float("inf"))
    one[0, 1] = 3.0
    for _ in range(4):
        probe(one, [0], [1], asked("a", adapter=SimpleNamespace(name="adapter")))
    assert adapter.means() == (0.0, 0.0, 1)  # certain of it


def test_shares_of_the_last_replies(watched):
    label = {"model_name": "toy"}
    for _ in range(3):
        watched.text(prompt="the fox", max_tokens=5, ignore_eos=True)
    watched.text(prompt="the fox", guided_choice=[" "])
    loop = watched.text(prompt="the fox", guided_regex="(ab){40}", max_tokens=100)
    assert loop == "ab" * 40
    assert watched.metric("foveate:reply_window", **label) == 5
    assert watched.metric("foveate:reply_length_share", **label) == pytest.approx(3 / 5)
    assert watched.metric("foveate:reply_empty_share", **label) == pytest.approx(1 / 5)
    assert watched.metric("foveate:reply_repeated_share", **label) == pytest.approx(1 / 5)


def test_schemas_that_fail(watched):
    label = {"model_name": "toy"}
    watched.error(400, prompt="x", guided_json={"type": "no such type"})
    assert watched.metric("foveate:schema_failures_total", **label, reason="refused") == 1
    watched.text(prompt="x", guided_regex="[a-z]{50}", max_tokens=3)
    assert watched.metric("foveate:schema_failures_total", **label, reason="unfinished") == 1
    watched.text(prompt="x", guided_choice=["fox"])
    assert watched.metric("foveate:schema_failures_total", **label, reason="unfinished") == 1


def test_thumbs(watched):
    chat = watched.post("/v1/chat/completions", messages=[{"role": "user", "content": "x"}], max_tokens=2).json()["id"]
    plain = watched.post("/v1/completions", prompt=["x", "y"], max_tokens=2).json()["id"]
    for name, rating in ((chat, "up"), (plain, "down")):
        assert watched.post("/v1/feedback", id=name, rating=rating).json() == {
            "id": name,
            "model": "toy",
            "rating": rating,
        }
        assert watched.metric("foveate:feedback_total", model_name="toy", rating=rating) == 1
    assert watched.error(409, "/v1/feedback", id=chat, rating="down")["code"] == "already_rated"
    assert watched.error(404, "/v1/feedback", id="chatcmpl-none", rating="up")["code"] == "answer_not_found"
    assert watched.error(400, "/v1/feedback", id=chat, rating="sideways")["param"] == "rating"
    assert watched.error(400, "/v1/feedback", id=chat, rating="up", comment="nice")["param"] == "comment"
    assert watched.metric("foveate:feedback_total", model_name="toy", rating="down") == 1


def test_other_prompts_are_seen_and_the_same_are_not(tmp_path):
    quality = Quality()
    shift = quality.of("toy").prompts
    shift.read_scripts(toys.tokenizer())
    encode = toys.tokenizer().encode
    usual = [encode(prompt) for prompt in ("the quick brown fox", "again and again", "the lazy dog: 12, 3", "déjà vu")]
    for i in range(WINDOW):
        assert shift.indices() == (0.0, 0.0) and shift.reference() is None
        shift.add(usual[i % 4])
    for i in range(WINDOW):
        shift.add(usual[i % 4])
    assert max(shift.indices()) < 0.01
    file = tmp_path / "reference.json"
    file.write_text(json.dumps(quality.report()))

    later = Quality(file).of("toy").prompts
    later.read_scripts(toys.tokenizer())
    for _ in range(WINDOW):
        later.add(encode("東京 " * 20))
    lengths, scripts = later.indices()
    assert lengths > 0.25 and scripts > 0.25


def test_scripts_of_tokens():
    for text, script in {"the": "latin", " déjà": "latin", "Москва": "cyrillic", "東京": "han", "かな": "kana", "한글": "hangul",
                         "مرحبا": "arabic", "हिन्दी": "indic", "12, {": "", "😀": "", "Ωμέγα": "greek"}.items():  # fmt: skip
        assert script_of(text) == script, text
    table = script_table(toys.tokenizer())
    assert [SCRIPTS[table[t]] for t in toys.tokenizer().encode("fox")] == ["latin"] * len(
        toys.tokenizer().encode("fox")
    )
    assert "han" in {SCRIPTS[table[t]] for t in toys.tokenizer().encode("東京")}  # by the first bytes of its characters


def test_the_index_is_the_sum_over_bins():
    assert stability_index([10, 30], [10, 30]) == 0
    p, q = torch.tensor([0.5, 10.5]) / 11, torch.tensor([10.5, 0.5]) / 11
    assert stability_index([0, 10], [10, 0]) == pytest.approx(((q - p) * (q / p).log()).sum().item())


def test_small_rules(tmp_path):
    assert repeats_itself([1, 2] * 16) and not repeats_itself(range(32)) and not repeats_itself([1] * 31)
    assert answer_id("chatcmpl-0a-1") == "chatcmpl-0a-1" and answer_id("cmpl-0a-1") == "cmpl-0a"
    file = tmp_path / "reference.json"
    for text in ("[", "[]", "{}", '{"toy": {"reference": {"lengths": [1], "scripts": []}}}', '{"toy": 3}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="reference"):
            read_references(file)


def test_no_text_is_kept(watched):
    watched.post("/v1/chat/completions", messages=[{"role": "user", "content": "lazy dog secret"}], max_tokens=4)
    told = watched.get("/metrics").text + watched.get("/quality").text
    assert "lazy" not in told and "secret" not in told
    assert all(watched.metric(f"foveate:{name}", model_name="toy") >= -100 for name in EXPLAINED)
    assert PromptShift(4)._table is None
