"""Log-likelihoods are those of one plain forward pass, whatever is shared, padded, cut or in parts."""

from __future__ import annotations

import random

import pytest
import torch

import foveate
import generation_toys as toys
from foveate.evaluate import Scorer


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = toys.folder(tmp_path_factory.mktemp("scored"))
    return foveate.LLM(folder, num_pages=64, page_size=4, max_prefill_tokens=16, progress=False)


def expected(llm, context, continuation):
    """One token after the other through the public generation, which is another path: prompt_logprobs."""
    tokens = [*context, *continuation][-(llm.max_model_len + 1) :]
    [output] = llm.generate(
        [tokens[: llm.max_model_len - 1]], foveate.SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
    )
    entries = output.prompt_logprobs[len(tokens) - len(continuation) :]
    return [entry[token] for entry, token in zip(entries, continuation)]


def cases(llm):
    numbers = random.Random(1)
    vocab = llm.engine.model.config.vocab_size

    def some(n):
        return [numbers.randrange(2, vocab) for _ in range(n)]

    few_shot = some(23)
    found = []
    for _ in range(6):  # a beginning, then contexts, each with several continuations
        context = few_shot + some(numbers.randint(1, 9))
        found += [(context, some(numbers.randint(1, 6))) for _ in range(3)]
    one = some(1)
    found += [(one, some(30)), (one, some(1)), (some(40), some(2)), (few_shot, few_shot), (one, some(3)), (one, [])]
    numbers.shuffle(found)
    return found


def test_equal_to_plain_passes(llm):
    requests = cases(llm)
    done = []
    scored = Scorer(llm).score(requests, done.append)
    assert sum(done) == len(requests)
    for (context, continuation), one in zip(requests, scored):
        entries = expected(llm, context, continuation) if continuation else []
        torch.testing.assert_close(one.logprobs, [entry.logprob for entry in entries], atol=2e-5, rtol=1e-5)
        assert one.greedy == all(entry.rank == 1 for entry in entries)
    assert len(llm.engine.cache) == 0  # nothing is left


def test_shared_beginnings_are_computed_once(llm, monkeypatch):
    context = list(range(2, 42))
    seen = []
    hidden = llm.model.hidden
    monkeypatch.setattr(
        llm.model, "hidden", lambda ids, cache: seen.append(ids.numel()) or hidden(ids, cache), raising=False
    )
    Scorer(llm).score([(context, [5, 6, token]) for token in range(50, 58)])
    assert sum(seen) < len(context) + 8 * 4


def test_a_small_cache_is_enough(tmp_path):
    folder = toys.folder(tmp_path)
    small = foveate.LLM(folder, num_pages=12, page_size=4, progress=False)
    requests = [(list(range(2, 2 + n)), [3, 4, 5]) for n in (5, 20, 30, 38)] * 3
    large = foveate.LLM(folder, num_pages=200, page_size=4, progress=False)
    torch.testing.assert_close(
        [one.total for one in Scorer(small).score(requests)],
        [one.total for one in Scorer(large).score(requests)],
        atol=1e-4,
        rtol=1e-5,
    )
    assert len(small.engine.cache) == 0


def test_long_texts_lose_their_beginning(llm):
    most = llm.max_model_len
    tokens = [2 + i % 50 for i in range(most + 20)]
    [cut] = Scorer(llm).score([(tokens[:-5], tokens[-5:])])
    [short] = Scorer(llm).score([(tokens[-(most + 1) : -5], tokens[-5:])])
    assert cut == short


@pytest.mark.parametrize(
    "request_, sentence",
    [(([], [1]), "a context is empty"), (([1], [10**6]), "a token id that is not"), (([1], [2] * 5000), "cut it")],
)
def test_what_cannot_be_scored(llm, request_, sentence):
    with pytest.raises(ValueError, match=sentence):
        Scorer(llm).score([request_])
