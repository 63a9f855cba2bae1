"""One request that cannot be served fails alone, with the reason; threads share an LLM; parameters of every type get a sentence."""

from __future__ import annotations

import copy
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from foveate import LLM, QuestionAnswerer, SamplingParams
from foveate.generation import Engine
from foveate.generation.sampler import SamplingState, sample
from generation_toys import cache, engine, model, tokenizer
from hostile import llama_folder

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def run(of: Engine, requests):
    for name, (tokens, params) in requests.items():
        of.add(name, tokens, params)
    found = {}
    while of.has_work:
        for output in of.step():
            found[output.request_id] = output.outputs[0]
    return found


def forbid_all(temperature: float, **options) -> SamplingParams:
    ids = list(range(model().config.vocab_size))
    return SamplingParams(temperature=temperature, min_tokens=5, max_tokens=5, stop_token_ids=ids, **options)


@pytest.mark.parametrize(
    "params",
    [
        forbid_all(0),
        forbid_all(1.0),
        forbid_all(1.0, top_k=3),
        forbid_all(0, prompt_lookup=3),
        forbid_all(1.0, logprobs=2),
        forbid_all(1.0, n=3),
    ],
    ids=["greedy", "drawn", "top_k", "drafts", "logprobs", "n"],
)
def test_a_request_without_a_choice_ends_alone(params):
    alone = run(engine(), {"good": ([5, 6, 7], GOOD)})["good"].token_ids
    found = run(engine(), {"good": ([5, 6, 7], GOOD), "bad": ([5, 6], params), "late": ([5, 6, 7], GOOD)})
    assert found["good"].token_ids == found["late"].token_ids == alone
    assert found["bad"].finish_reason == "abort" and found["bad"].token_ids == []
    assert "no token is allowed to come next" in found["bad"].stop_reason


class Poisoned:
    """A model whose logits are NaN where the hidden state belongs to a sequence that has the token 300, never a good one."""

    def __init__(self, bad: float) -> None:
        self.inner, self.config, self.bad = model(), model().config, bad

    def hidden(self, tokens, view):
        hidden = self.inner.hidden(tokens, view)
        hidden[(tokens == 300).any(1), -1] = self.bad
        return hidden

    def logits(self, hidden):
        return self.inner.logits(hidden)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "options",
    [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0, "logprobs": 1}],
)
def test_logits_that_are_not_finite_end_their_request(bad, options):
    alone = run(engine(), {"good": ([5, 6, 7], GOOD)})["good"].token_ids
    found = run(
        engine(model=Poisoned(bad)),
        {"bad": ([5, 300], SamplingParams(max_tokens=5, **options)), "good": ([5, 6, 7], GOOD)},
    )
    assert 300 not in alone and found["good"].token_ids == alone
    assert found["bad"].finish_reason == "abort" and "logits are not finite" in found["bad"].stop_reason


@pytest.mark.parametrize("temperature", [1e-300, 1e-320, 1e-44, 1e-39])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_temperatures_below_fp32_are_their_limit(temperature, options):
    """argmax, and an even draw among ties."""
    logits = torch.randn(4, 300)
    rows = [SamplingState(SamplingParams(temperature=temperature, **options), [1, 2], seed=i) for i in range(4)]
    assert sample(logits, rows).tokens == logits.argmax(-1).tolist()
    ties = torch.zeros(1, 300)
    ties[0, [7, 90]] = 5.0
    drawn = {
        sample(ties, [SamplingState(SamplingParams(temperature=temperature, **options), [1], seed=i)]).tokens[0]
        for i in range(60)
    }
    assert drawn == {7, 90}


def test_beam_search_says_that_it_cannot_go_on(tmp_path):
    llm = LLM(llama_folder(tmp_path), kv_cache_bytes=1 << 20, progress=False)
    with pytest.raises(ValueError, match="beam search cannot go on"):
        llm.generate([[5]], SamplingParams(num_beams=2, min_tokens=3, max_tokens=4, stop_token_ids=list(range(64))))
    before = llm.engine.cache.free_pages
    llm.generate([[5]], SamplingParams(num_beams=2, max_tokens=4))
    assert llm.engine.cache.free_pages == before


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"temperature": "1"}, "temperature='1' must be a number, not str"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"temperature": float("nan")}, "temperature=nan must be between"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty=1e-300 must be above 0, between 1e-06"),
        ({"max_tokens": 16.0}, "max_tokens=16.0 must be an int, not"),
        ({"n": None}, "n=None must be an int"),
        ({"logprobs": True}, "logprobs=True must be an int, not"),
        ({"logprobs": -2}, "logprobs=-2 must be -1 or more"),
        ({"logit_bias": {"5": 1}}, "logit_bias has '5'"),
        ({"logit_bias": {5: "x"}}, "logit_bias has 5: 'x'"),
        ({"logit_bias": [(5, 1)]}, "logit_bias=.* must be a dict"),
        ({"stop_token_ids": 5}, "stop_token_ids=5 must be a list"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids="),
        ({"bad_words": "abc"}, "bad_words='abc' must be a list"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": 5}, "stop=5 must be a string"),
        ({"skip_special_tokens": None}, "skip_special_tokens=None must be True or False"),
        ({"json_schema": "[" * 100_000}, "nested too deeply"),
        ({"regex": 5}, "regex=5 must be a str"),
    ],
)  # fmt: skip
def test_parameters_of_other_types(options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        SamplingParams(**options)


def test_sentinels_and_numbers_of_numpy():
    params = SamplingParams(max_tokens=np.int64(5), temperature=np.float32(0.5), stop=("a",), top_k=-1)
    assert type(params.max_tokens) is int and type(params.temperature) is float
    [output] = run(
        engine(), {"a": ([5, 6], SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, logprobs=-1))}
    ).values()
    assert output.finish_reason == "length" and len(output.token_ids) == 254
    assert len(output.logprobs[0]) == model().config.vocab_size


def test_threads_share_an_llm(tmp_path):
    llm = LLM(llama_folder(tmp_path), kv_cache_bytes=1 << 20, progress=False)
    free = llm.engine.cache.free_pages
    prompts = [[3 + i] * (i % 5 + 1) for i in range(12)]
    right = [llm.generate([p], GOOD)[0].outputs[0].token_ids for p in prompts]
    texts = ["".join(llm.stream(p, GOOD)) for p in prompts]
    ppl = llm.perplexity(prompts[4])

    def work(seed: int) -> bool:
        draw = random.Random(seed)
        for _ in range(12):
            i = draw.randrange(12)
            kind = draw.randrange(4)
            if kind == 0:
                assert "".join(llm.stream(prompts[i], GOOD)) == texts[i]
            elif kind == 1:
                assert llm.perplexity(prompts[4]) == pytest.approx(ppl)
            elif kind == 2:
                llm.generate([prompts[i]], SamplingParams(num_beams=2, max_tokens=3))
            else:
                assert [o.outputs[0].token_ids for o in llm.generate([prompts[i], prompts[0]], GOOD)] == [
                    right[i],
                    right[0],
                ]
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert not llm.engine.has_work and not llm._inboxes
    if llm.engine.scheduler.prefix is not None:
        llm.engine.scheduler.prefix.evict(10**6)
    assert llm.engine.cache.free_pages == free


def test_threads_share_a_cache_and_a_tokenizer():
    made = cache(num_pages=200)
    text = tokenizer()
    right = text.encode("the quick brown fox")
    errors = []

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(200):
                seq = made.create()
                made.append([seq], draw.randrange(1, 20))
                other = made.fork(seq)
                made.append([other])
                assert int(made.kv_lens([other])[0]) == made.length(seq) + 1
                assert text.encode("the quick brown fox") == right
                made.free(seq)
                made.free(other)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and made.free_pages == 200 and len(made) == 0


def test_copies_and_pickles(tmp_path):
    llm = LLM(llama_folder(tmp_path), kv_cache_bytes=1 << 20, progress=False)
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="an LLM cannot be pickled or copied"):
            attempt(llm)
    made = cache()
    seq = made.create()
    made.append([seq], 3)
    other = pickle.loads(pickle.dumps(made))
    other.append([seq], 2)
    assert (other.length(seq), made.length(seq)) == (5, 3)
    assert QuestionAnswerer is not None
