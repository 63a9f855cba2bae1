"""The engine: greedy tokens are those of the plain forward pass, and no batch, chunk, fork or preemption shows in the output."""

from __future__ import annotations

import random

import pytest
import torch

import foveate
import generation_toys as toys
from foveate.generation import Engine, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


def run(engine, prompts, params):
    params = params if isinstance(params, list) else [params] * len(prompts)
    for i, (prompt, p) in enumerate(zip(prompts, params)):
        engine.add(str(i), prompt, p)
    outputs = toys.drain(engine)
    return [outputs[str(i)] for i in range(len(prompts))]


def ids(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_prefill_tokens": 5},
        {"max_batch": 1},
        {"max_batch": 3, "num_pages": 28},
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
def test_greedy_output_equals_the_forward_pass_without_a_cache(options):
    prompts = toys.prompts(9)
    engine = toys.engine(**options)
    outputs = run(engine, prompts, GREEDY)
    assert ids(outputs) == [[toys.greedy(prompt, 20)] for prompt in prompts]
    assert all(o.finished and o.outputs[0].finish_reason in ("length", "stop") for o in outputs)
    toys.check_pages(engine)
    if options.get("num_pages"):
        assert engine.stats.preemptions > 0


def test_requests_join_and_leave_between_steps():
    rng, engine, prompts = (
        random.Random(3),
        toys.engine(num_pages=40, max_prefill_tokens=16, max_batch=4),
        toys.prompts(14, seed=5),
    )
    lengths = [rng.randint(1, 25) for _ in prompts]
    outputs, waiting = {}, list(range(len(prompts)))
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.4:
            i = waiting.pop(0)
            engine.add(str(i), prompts[i], GREEDY.with_(max_tokens=lengths[i]))
        outputs |= {output.request_id: output for output in engine.step()}
    for i, prompt in enumerate(prompts):
        assert outputs[str(i)].outputs[0].token_ids == toys.greedy(prompt, lengths[i])
    toys.check_pages(engine)


SAMPLED = [
    SamplingParams(seed=1, max_tokens=18),
    SamplingParams(seed=2, max_tokens=18, temperature=0.7, top_k=20),
    SamplingParams(seed=3, max_tokens=18, top_p=0.8, n=3),
    SamplingParams(seed=4, max_tokens=18, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.5, n=2, logprobs=2),
    SamplingParams(temperature=0.0, max_tokens=18, presence_penalty=1.0),
]


@pytest.mark.parametrize(
    "options", [{"max_prefill_tokens": 7}, {"num_pages": 26, "max_batch": 6}, {"max_batch": 2}, {"enable_prefix_caching": False}],
    ids=str,
)  # fmt: skip
def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(options):
    prompts = toys.prompts(5, seed=1)
    alone = [ids(run(toys.engine(), [prompt], params))[0] for prompt, params in zip(prompts, SAMPLED)]
    assert len({tuple(tokens) for tokens in alone[2]}) > 1, "the samples of a request differ"
    engine = toys.engine(**options)
    assert ids(run(engine, prompts, SAMPLED)) == alone
    if "num_pages" in options:
        assert engine.stats.preemptions > 0
    toys.check_pages(engine)


def test_a_request_without_a_seed_follows_torchs_generator():
    prompt, params = toys.prompts(1), SamplingParams(max_tokens=12)
    torch.manual_seed(5)
    first, second = ids(run(toys.engine(), prompt, params)), ids(run(toys.engine(), prompt, params))
    torch.manual_seed(5)
    assert ids(run(toys.engine(), prompt, params)) == first != second


def test_equal_prefixes_are_computed_once():
    shared = toys.prompts(1, 40, 40)[0]
    prompts = [shared + tail for tail in toys.prompts(4, 3, 6, seed=2)]
    engine = toys.engine()
    first = run(engine, prompts[:1], GREEDY)
    computed = engine.stats.prefill_tokens
    outputs = run(engine, prompts[1:], GREEDY)
    assert first[0].metrics.cached_tokens == 0
    assert [o.metrics.cached_tokens for o in outputs] == [40, 40, 40]
    assert engine.stats.prefill_tokens - computed == sum(len(p) - 40 for p in prompts[1:])
    assert ids(first + outputs) == [[toys.greedy(prompt, 20)] for prompt in prompts]
    # a whole prompt that is there: its last page is computed, since its last token needs an output; the reply is there too
    again = run(engine, [prompts[0] + first[0].outputs[0].token_ids], GREEDY)
    total = len(prompts[0]) + len(first[0].outputs[0].token_ids)
    assert again[0].metrics.cached_tokens == (total - 1) // 4 * 4
    toys.check_pages(engine)


def test_pages_of_finished_requests_give_way_to_new_ones():
    engine = toys.engine(num_pages=16, max_batch=2)
    for seed in range(6):
        prompts = toys.prompts(3, 20, 30, seed=seed)
        assert ids(run(engine, prompts, GREEDY)) == [[toys.greedy(prompt, 20)] for prompt in prompts]
        toys.check_pages(engine)
    assert len(engine.scheduler.prefix) > 0


def test_identical_prompts_that_arrive_together_and_a_full_cache():
    """The same pages are computed twice then; the tree keeps one of each, and neither is lost or freed twice."""
    prompt = toys.prompts(1, 21, 21)[0]
    engine = toys.engine(num_pages=11, max_batch=3)  # 41 tokens need 11 pages
    assert ids(run(engine, [prompt] * 4, GREEDY)) == [[toys.greedy(prompt, 20)]] * 4
    toys.check_pages(engine)


def test_samples_share_the_prompt():
    engine = toys.engine(enable_prefix_caching=False)
    prompt = toys.prompts(1, 30, 30)[0]
    engine.add("a", prompt, SamplingParams(n=5, seed=0, max_tokens=6))
    engine.step()
    assert engine.stats.prefill_tokens == 30
    engine.step()
    assert engine.cache.stats().shared_pages == 7
    output = toys.drain(engine)["a"]
    assert engine.stats.prefill_tokens == 30 and len({tuple(o.token_ids) for o in output.outputs}) > 1
    assert [o.index for o in output.outputs] == [0, 1, 2, 3, 4]


def test_best_of_returns_the_most_probable_samples():
    prompt, params = toys.prompts(1), SamplingParams(n=6, seed=9, max_tokens=5, logprobs=0)
    everything = run(toys.engine(), prompt, params)[0].outputs
    best = run(toys.engine(), prompt, params.with_(n=2, best_of=6, logprobs=None))[0].outputs
    expected = sorted(everything, key=lambda o: -o.cumulative_logprob)[:2]
    assert [o.token_ids for o in best] == [o.token_ids for o in expected]
    assert [o.cumulative_logprob for o in best] == pytest.approx([o.cumulative_logprob for o in expected])
    assert best[0].logprobs is None


@pytest.mark.parametrize("chunk", [512, 4])
def test_logprobs_of_prompt_and_output_are_those_of_the_forward_pass(chunk):
    prompt = toys.prompts(1, 11, 11)[0]
    engine = toys.engine(max_prefill_tokens=chunk)
    run(engine, [prompt], GREEDY)  # so that the prefix cache would have it
    output = run(engine, [prompt], SamplingParams(seed=7, max_tokens=6, logprobs=2, prompt_logprobs=1))[0]
    sample = output.outputs[0]
    tokens = prompt + sample.token_ids
    expected = toys.model()(torch.tensor([tokens]))[0].log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    for position, found in enumerate([*output.prompt_logprobs[1:], *sample.logprobs], 1):
        row, token = expected[position - 1], tokens[position]
        assert found[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert found[token].rank == int((row > row[token]).sum()) + 1
        best = next(t for t, entry in found.items() if entry.rank == 1)
        assert best == int(row.argmax())
        assert found[best].decoded_token == toys.tokenizer().decode([best], False)
    assert sample.cumulative_logprob == pytest.approx(
        sum(f[t].logprob for f, t in zip(sample.logprobs, sample.token_ids))
    )
    assert {len(found) for found in sample.logprobs} <= {2, 3}


def test_an_aborted_request_leaves_and_the_others_go_on():
    prompts = toys.prompts(3)
    engine = toys.engine()
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, GREEDY)
    for _ in range(4):
        engine.step()
    gone = engine.abort("1")
    assert gone.outputs[0].finish_reason == "abort" and gone.outputs[0].token_ids == toys.greedy(prompts[1], 4)
    assert engine.abort("1") is None
    outputs = toys.drain(engine)
    assert {i: o.outputs[0].token_ids for i, o in outputs.items()} == {
        i: toys.greedy(prompts[int(i)], 20) for i in "02"
    }
    toys.check_pages(engine)


def test_the_context_ends_a_request():
    engine = toys.engine(max_length=20)
    output = run(engine, [toys.prompts(1, 15, 15)[0]], SamplingParams(max_tokens=100, ignore_eos=True, seed=0))[0]
    assert len(output.outputs[0].token_ids) == 5 and output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    "tokens, params, sentence",
    [
        ([], GREEDY, "the prompt is empty"),
        ([5] * 256, GREEDY, "the prompt has 256 tokens and the context 256; shorten the prompt to 255 tokens"),
        ([5, 336], GREEDY, "token id 336; this model's ids go from 0 to 335"),
        (
            [5] * 30,
            GREEDY,
            "30 prompt tokens and up to 20 new ones need 13 pages of 4 tokens, and there are 8; .* num_pages=13",
        ),
        ([5], SamplingParams(num_beams=2), "beam search does not run in a batch with others"),
        ([5], SamplingParams(logit_bias={900: 1.0}), "has the token id 900"),
    ],
)
def test_requests_that_cannot_run_are_refused_in_a_sentence(tokens, params, sentence):
    engine = toys.engine(num_pages=8)
    with pytest.raises(ValueError, match=sentence):
        engine.add("a", tokens, params)
    assert not engine.has_work


def test_a_context_made_short_says_what_the_model_takes():
    with pytest.raises(ValueError, match="19 tokens or fewer, or allow more with max_model_len .* the model takes 256"):
        toys.engine(max_length=20).add("a", [5] * 20, GREEDY)


def test_an_id_must_be_new():
    engine = toys.engine()
    engine.add("a", [5, 6], GREEDY)
    with pytest.raises(ValueError, match="a request 'a' is running already"):
        engine.add("a", [5, 6], GREEDY)


def test_step_without_work_does_nothing():
    assert toys.engine().step() == []


def test_gpt2_with_positions_from_the_cache():
    from foveate.models.gpt2 import GPT2, GPT2Config

    torch.manual_seed(2)
    sizes = {"vocab_size": 336, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": None}
    model = (
        GPT2(GPT2Config.from_hf({"model_type": "gpt2", "activation_function": "gelu_new", **sizes}))
        .eval()
        .requires_grad_(False)
    )
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    cache = foveate.PagedKVCache(60, 4, num_kv_heads=2, head_dim=16, num_layers=2, dtype=torch.float32)
    engine = Engine(model, cache, eos_ids={toys.EOS}, max_prefill_tokens=8)
    prompts = [*toys.prompts(4, 5, 30), [9, 9, 9] * 20]
    outputs = run(engine, prompts, GREEDY.with_(prompt_lookup=3))
    expected = [toys.greedy(prompt, min(20, 64 - len(prompt)), model) for prompt in prompts]
    assert ids(outputs) == [[tokens] for tokens in expected]
    assert outputs[0].outputs[0].text == ""
    # One draft is long, and another sample is too near to the end of the context for a step of that length.
    repeat = GREEDY.with_(prompt_lookup=8, logit_bias={9: 90.0}, max_tokens=30)
    cache = foveate.PagedKVCache(60, 4, num_kv_heads=2, head_dim=16, num_layers=2, dtype=torch.float32)
    engine = Engine(model, cache, max_prefill_tokens=128)
    assert ids(run(engine, [[9] * 58, [9] * 30], repeat)) == [[[9] * 6], [[9] * 30]]
    assert engine.stats.accepted_tokens > 0


def bits(outputs):
    """Tokens with their exact log-probabilities."""
    return [
        [[(token, found[token].logprob) for token, found in zip(o.token_ids, o.logprobs)] for o in output.outputs]
        for output in outputs
    ]


def test_the_native_decoder_gives_the_same_bits_in_any_batch():
    """With chunks of few tokens: attention takes larger tiles of keys for many queries, and so another order of sums."""
    prompts = toys.prompts(8, 3, 11, seed=6)
    few = {"model": toys.native_model(), "max_prefill_tokens": 5}
    params = [
        SamplingParams(
            temperature=0.0 if i % 2 else 0.9, seed=i, max_tokens=18, logprobs=0, prompt_lookup=i % 3, ignore_eos=True
        )
        for i in range(8)
    ]
    alone = [bits(run(toys.engine(**few), [prompt], p))[0] for prompt, p in zip(prompts, params)]
    for options in ({}, {"max_batch": 3}, {"num_pages": 24}, {"max_prefill_tokens": 3, "enable_prefix_caching": False}):
        engine = toys.engine(**(few | options))
        assert bits(run(engine, prompts, params)) == alone, options
        assert engine.stats.accepted_tokens > 0
        assert engine.stats.preemptions > 0 or "num_pages" not in options
    without = [
        bits(run(toys.engine(**few), [prompt], p.with_(prompt_lookup=0)))[0] for prompt, p in zip(prompts, params)
    ]
    assert without == alone


def test_the_native_decoder_gives_the_same_bits_however_a_prompt_is_divided():
    """By chunks, by what of it is cached, and by preemptions: prompts and what is generated have a kernel each, whatever a step's size."""
    prompts = toys.prompts(3, 70, 100, seed=9)
    prompts.append(prompts[0][:64] + prompts[1][:5])
    params = GREEDY.with_(max_tokens=40, logprobs=0, ignore_eos=True)
    whole = {"model": toys.native_model(), "max_prefill_tokens": 512, "num_pages": 200}
    alone = [bits(run(toys.engine(**whole), [prompt], params))[0] for prompt in prompts]
    for options in ({}, {"max_prefill_tokens": 33}, {"max_prefill_tokens": 7}, {"num_pages": 64}):
        engine = toys.engine(**(whole | options))
        assert bits(run(engine, prompts, params)) == alone, options
        assert engine.stats.preemptions > 0 or "num_pages" not in options
        outputs = run(engine, prompts, params)
        assert bits(outputs) == alone, options
        assert outputs[0].metrics.cached_tokens >= 60 or "num_pages" in options


def test_the_native_decoder_generates_what_the_modules_do():
    prompts = toys.prompts(6, 3, 60, seed=2)
    outputs = run(toys.engine(model=toys.native_model(), num_pages=200), prompts, GREEDY)
    assert ids(outputs) == [[toys.greedy(prompt, 20)] for prompt in prompts]


def test_foreign_sequences_that_fill_the_cache_are_named():
    engine = toys.engine(num_pages=8)
    engine.cache.append([engine.cache.create()], 30)
    engine.add("a", [5] * 6, GREEDY.with_(max_tokens=4))
    with pytest.raises(foveate.CacheFull, match="nothing can run: .* 8 pages, 0 are free"):
        engine.step()


@pytest.mark.parametrize("round", range(4))
def test_anything_at_any_time_in_a_small_cache(round):
    """Random requests with random parameters join, some are aborted; each gives what it gives alone, and no page is lost."""
    rng = random.Random(round)
    engine = toys.engine(
        num_pages=22,
        max_batch=rng.choice([3, 8]),
        max_prefill_tokens=rng.choice([6, 24, 64]),
        enable_prefix_caching=round % 2 == 0,
    )
    shared = toys.prompts(1, 16, 16, seed=round)[0]
    prompts = [shared[: rng.choice([0, 8, 16])] + tail for tail in toys.prompts(16, 2, 30, seed=10 + round)]
    params = [
        SamplingParams(
            n=rng.choice([1, 1, 3]), seed=i, max_tokens=rng.randint(1, 30), temperature=rng.choice([0.0, 0.8]),
            top_k=rng.choice([0, 5]), prompt_lookup=rng.choice([0, 4]), logit_bias={6: 60.0} if i % 4 == 0 else None,
        )
        for i in range(16)
    ]  # fmt: skip
    outputs, aborted, waiting = {}, set(), list(range(16))
    while waiting or engine.has_work:
        if waiting and rng.random() < 0.5:
            i = waiting.pop(0)
            engine.add(str(i), prompts[i], params[i])
        if rng.random() < 0.03 and engine.has_work:
            i = rng.choice([i for i in range(16) if i not in waiting and str(i) not in outputs])
            outputs[str(i)] = engine.abort(str(i))
            aborted.add(i)
        outputs |= {output.request_id: output for output in engine.step()}
        assert len(engine.scheduler.running) <= engine.scheduler.max_batch
    toys.check_pages(engine)
    assert engine.stats.preemptions > 0 and engine.stats.accepted_tokens > 0
    for i in set(range(16)) - aborted:
        assert ids([outputs[str(i)]]) == ids(run(toys.engine(), [prompts[i]], params[i].with_(prompt_lookup=0))), i


def test_a_chunk_that_preempts_the_next_one():
    engine = toys.engine(num_pages=24, enable_prefix_caching=False, max_prefill_tokens=12)
    prompts = [toys.prompts(1, length, length, seed=length)[0] for length in (15, 14, 20)]
    for i, prompt in enumerate(prompts):
        engine.add(str(i), prompt, GREEDY.with_(max_tokens=10))
    engine.step()
    engine.step()
    assert [sample.cached for sample in engine.scheduler.running] == [15, 9, 0]
    foreign = engine.cache.create()
    engine.cache.append([foreign], 4 * engine.cache.free_pages)
    engine.step()  # the first decodes in its page; the second needs one, so the third and then itself have to wait
    assert [sample.cached for sample in engine.scheduler.running] == [16] and engine.stats.preemptions == 2
    engine.cache.free(foreign)
    outputs = toys.drain(engine)
    assert ids([outputs[i] for i in "012"]) == [[toys.greedy(prompt, 10)] for prompt in prompts]
