"""A draft model changes the speed and never a token: greedy and sampled, in batches, with forks, grammars, chunks and preemption."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch

import foveate
import generation_toys as toys
from foveate.generation import Engine, SamplingParams
from foveate.generation.draft_model import DraftModel
from hostile import llama_folder

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(seed=1, max_tokens=18),
    SamplingParams(seed=2, max_tokens=18, temperature=0.7, top_k=20, logprobs=2),
    SamplingParams(seed=3, max_tokens=18, top_p=0.8, n=3),
    SamplingParams(seed=4, max_tokens=18, repetition_penalty=1.3, frequency_penalty=0.5, min_tokens=5),
    SamplingParams(seed=5, max_tokens=18, regex="[a-z ]{3,9}"),
    SamplingParams(seed=6, max_tokens=18, stop=["e"], bad_words=["a"], prompt_lookup=2),
]


def like(noise: float):
    """The toy model with weights that are off by noise."""
    made = copy.deepcopy(toys.model())
    generator = torch.Generator().manual_seed(3)
    for parameter in made.parameters():
        parameter += noise * torch.randn(parameter.shape, generator=generator)
    return made


def draft(model, num_pages: int = 64, **options) -> DraftModel:
    return DraftModel(model, toys.cache(num_pages), vocab_size=336, **options)


def run(engine: Engine, prompts, params) -> list[list[list[int]]]:
    for i, (prompt, p) in enumerate(zip(prompts, params)):
        engine.add(str(i), prompt, p)
    outputs = toys.drain(engine)
    return [[sample.token_ids for sample in outputs[str(i)].outputs] for i in range(len(prompts))]


def check_nothing_kept(engine: Engine) -> None:
    toys.check_pages(engine)
    guesses = engine.scheduler.draft
    assert guesses is not None and not guesses._known
    assert guesses.cache.free_pages == guesses.cache.num_pages


@pytest.mark.parametrize(
    ("noise", "options"),
    [
        (0.0, {}),
        (3.0, {}),
        (0.02, {"max_prefill_tokens": 5}),
        (0.02, {"num_pages": 34, "max_batch": 5}),
        (0.02, {"enable_prefix_caching": False}),
    ],
    ids=str,
)
def test_the_tokens_are_those_without_guesses(noise: float, options: dict) -> None:
    prompts = toys.prompts(len(PARAMS), seed=7)
    alone = [run(toys.engine(), [prompt], [p])[0] for prompt, p in zip(prompts, PARAMS)]
    engine = toys.engine(draft=draft(like(noise), max_batch=16, max_prefill_tokens=9), **options)
    assert run(engine, prompts, PARAMS) == alone
    stats = engine.stats
    assert stats.drafted_tokens > 0
    if noise == 0:
        assert stats.accepted_tokens > 0.6 * stats.drafted_tokens
    assert stats.preemptions > 0 or "num_pages" not in options
    check_nothing_kept(engine)


def test_the_same_model_guesses_right() -> None:
    """Greedy and sampled: the guess is made with the random number that the choice is made with."""
    for params in (GREEDY, SamplingParams(seed=9, max_tokens=20, ignore_eos=True)):
        engine = toys.engine(draft=draft(toys.model(), tokens=3))
        engine.add("a", toys.prompts(1)[0], params)
        toys.drain(engine)
        assert engine.stats.accepted_tokens == engine.stats.drafted_tokens == 14
        assert engine.stats.steps == 6  # the prompt with its first token, then four tokens a step, and the rest


def test_what_nothing_is_guessed_for() -> None:
    prompts = toys.prompts(3, seed=2)
    for made in (
        draft(toys.model(), max_batch=2),
        draft(toys.model(), num_pages=1),  # no room for a prompt
        draft(toys.model(vocab=8)),  # no token of the prompts
        draft(toys.model(positions=2)),
    ):
        engine = toys.engine(draft=made)
        until_the_end = [GREEDY.with_(ignore_eos=False)] * 3
        assert run(engine, prompts, until_the_end) == [[toys.greedy(prompt, 20)] for prompt in prompts]
        assert engine.stats.drafted_tokens == 0
        check_nothing_kept(engine)


def test_tokens_that_only_the_smaller_model_has() -> None:
    wide = toys.model(vocab=400, seed=1)
    engine = toys.engine(draft=draft(wide))
    prompts = toys.prompts(4, seed=4)
    alone = [run(toys.engine(), [prompt], [GREEDY])[0] for prompt in prompts]
    assert run(engine, prompts, [GREEDY] * 4) == alone


def test_aborted_and_joining_requests_leave_nothing() -> None:
    rng = random.Random(1)
    engine = toys.engine(draft=draft(like(0.02), max_batch=4), num_pages=48)
    prompts, waiting, aborted = toys.prompts(12, seed=8), list(range(12)), 0
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.5:
            i = waiting.pop()
            engine.add(str(i), prompts[i], PARAMS[i % len(PARAMS)])
        engine.step()
        if rng.random() < 0.15 and engine._requests:
            engine.abort(rng.choice(list(engine._requests)))
            aborted += 1
    assert aborted > 0
    check_nothing_kept(engine)


def test_a_fresh_engine_guesses_on_its_own() -> None:
    engine = toys.engine(draft=draft(toys.model()))
    engine.add("a", toys.prompts(1)[0], GREEDY)
    engine.step()
    other = engine.fresh()
    other.add("b", toys.prompts(1)[0], GREEDY)
    toys.drain(other)
    assert other.stats.accepted_tokens > 0 and other.scheduler.draft.cache is not engine.scheduler.draft.cache


def test_llm(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "other").mkdir()
    path = toys.folder(tmp_path / "model")
    plain, quick = foveate.LLM(path, num_pages=80), foveate.LLM(path, num_pages=80, draft_model=path, draft_tokens=3)
    assert "3 tokens at a time are guessed by model (the native decoder)" in quick.runs_on or "torch" in quick.runs_on
    prompts = ["the quick brown", "naïve café", '{"name": ']
    for params in (SamplingParams(temperature=0, max_tokens=24), SamplingParams(seed=3, max_tokens=24)):
        found = [[o.outputs[0].token_ids for o in llm.generate(prompts, params)] for llm in (plain, quick)]
        assert found[0] == found[1]
    assert quick.stats.accepted_tokens > 0.9 * quick.stats.drafted_tokens > 0
    output = quick.generate("the quick brown", GREEDY)[0]
    assert output.metrics.accepted_tokens > 0
    with pytest.raises(ValueError, match="tokens=0 of a draft model must be 1 or more"):
        foveate.LLM(path, num_pages=80, draft_model=path, draft_tokens=0)
    tokenizer = json.loads((tmp_path / "model/tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    (one, first), (two, second) = list(vocab.items())[20:22]
    vocab[one], vocab[two] = second, first
    other = toys.folder(tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="has another tokenizer: .* is the token .* there and .* in the model"):
        foveate.LLM(path, num_pages=80, draft_model=other)


def formats(model) -> set[str | None]:
    """Of the layers' matrices; None for a plain nn.Linear."""
    found = {name: module for name, module in getattr(model, "model", model).named_modules() if name.endswith("_proj")}
    assert found
    return {getattr(module, "format", None) for module in found.values()}


@pytest.mark.parametrize("quantization", [None, "q8_0"])
def test_a_draft_has_a_format_of_its_own(quantization, tmp_path) -> None:
    path = llama_folder(tmp_path / "model")
    plain = foveate.LLM(path, num_pages=16, quantization=quantization)
    prompts = [[5, 6, 7], [9, 30]]
    expected = [o.outputs[0].token_ids for o in plain.generate(prompts, GREEDY)]
    unquantised = formats(foveate.LLM(path, num_pages=16).engine.model)
    for given, wanted in ((None, formats(plain.engine.model)), ("q4_0", {"q4_0"}), ("none", unquantised)):
        llm = foveate.LLM(path, num_pages=16, quantization=quantization, draft_model=path, draft_quantization=given)
        assert formats(llm.engine.scheduler.draft.model) == wanted
        assert formats(llm.engine.model) == formats(plain.engine.model)
        assert [o.outputs[0].token_ids for o in llm.generate(prompts, GREEDY)] == expected
        assert llm.stats.drafted_tokens > 0


def test_the_format_of_a_draft_is_checked_before_weights_are_read(tmp_path) -> None:
    path = llama_folder(tmp_path / "model")
    (path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="draft_quantization='q4_0' packs a draft model; give draft_model"):
        foveate.LLM(path, draft_quantization="q4_0")
    with pytest.raises(ValueError, match="draft_quantization='q2' is not one of None, 'none', 'q8_0'"):
        foveate.LLM(path, draft_model=path, draft_quantization="q2")
