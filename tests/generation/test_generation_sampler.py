"""Logits to tokens: each step against a plain oracle on one row, transformers' processors, and the statistics of many draws."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.backend.reference import attention as reference
from foveate.generation.params import SamplingParams
from foveate.generation.random_numbers import philox4x32, uniform
from foveate.generation.sampler import SamplingState, _invert, _sample_block, sample

VOCAB = 300


def row(tokens=(5, 6, 7), prompt=2, **options):
    """A sample whose output is tokens[prompt:]."""
    extra = {key: options.pop(key) for key in ("end_ids", "forbidden", "mask", "sample", "seed") if key in options}
    growing = list(tokens[:prompt])
    made = SamplingState(SamplingParams(**options), growing, **extra)
    growing.extend(tokens[prompt:])
    return made


def oracle(logits, r):
    """The probabilities from which the token is drawn, fp64, in the words of the definition."""
    params, x = r.params, logits.double().clone()
    output = r.tokens[r.prompt_length :]
    for token in range(len(x)):
        if token in r.tokens:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
        x[token] += (params.logit_bias or {}).get(token, 0)
    if params.temperature == 0:
        return torch.nn.functional.one_hot(x.argmax(), len(x)).double()
    x = x / params.temperature
    p = x.softmax(-1)
    keep = p >= params.min_p * p.max()
    if params.top_k > 0:
        keep &= p >= p[keep].sort(descending=True).values[: params.top_k][-1]
    p = torch.where(keep, p, 0) / p[keep].sum()
    ordered = p.sort(descending=True)
    before = ordered.values.cumsum(-1) - ordered.values
    keep = p >= ordered.values[before < params.top_p][-1]
    return torch.where(keep, p, 0) / p[keep].sum()


OPTIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 250},
    {"top_k": -1},
    {"top_k": 10_000},
    {"top_p": 0.05},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.8},
    {"logit_bias": {4: 3.5, 9: -100.0}},
    {"temperature": 1.6, "top_k": 60, "top_p": 0.7, "min_p": 0.02, "repetition_penalty": 0.8, "presence_penalty": 0.3},
    {"temperature": 0.0, "repetition_penalty": 3.0, "frequency_penalty": 1.1, "logit_bias": {3: 9.0}},
]


@pytest.mark.parametrize("ties", [False, True])
def test_a_draw_is_the_inverse_of_the_oracles_distribution(ties):
    """In one batch with all the options: the drawn token is where the oracle's cumulative probability passes the random number."""
    rows = [row([5, 6, 7, 7, 9, 280][: 2 + i % 5], seed=i, **options) for i, options in enumerate(OPTIONS * 6)]
    logits = torch.randn(len(rows), VOCAB) * 3
    if ties:
        logits = (logits / 2).round() * 2  # as bf16 logits tie
    before = logits.clone()
    tokens = sample(logits, rows).tokens
    assert torch.equal(logits, before)
    for i, r in enumerate(rows):
        cumulative = oracle(logits[i], r).cumsum(-1)
        low = 0.0 if tokens[i] == 0 else float(cumulative[tokens[i] - 1])
        assert low - 1e-6 <= r.random() <= float(cumulative[tokens[i]]) + 1e-6 or r.greedy
        assert float(oracle(logits[i], r)[tokens[i]]) > 0


def test_kept_tokens_are_those_of_the_oracle():
    """Enough draws from a peaked distribution see every kept token and no other."""
    logits = torch.randn(1, 40) * 1.5
    for options in ({"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.15}, {"top_k": 12, "top_p": 0.8, "min_p": 0.03}):
        rows = [row(seed=seed, **options) for seed in range(1500)]
        expected = oracle(logits[0], rows[0])
        counts = torch.bincount(torch.tensor(sample(logits.expand(1500, -1), rows).tokens), minlength=40)
        assert torch.equal(counts > 0, expected > 0)
        assert float((counts / 1500 - expected).abs().max()) < 0.05


def test_more_candidates_are_looked_at_when_the_first_do_not_reach_top_p():
    logits = torch.randn(2, 5000) * 0.01  # nearly flat: top_p = 0.95 keeps thousands
    rows = [row(seed=1, top_p=0.95), row(seed=2, top_p=0.5, top_k=900)]
    tokens = sample(logits, rows).tokens
    for i, r in enumerate(rows):
        p = oracle(logits[i], r)
        assert int((p > 0).sum()) > 400
        assert float(p[: tokens[i]].sum()) - 1e-4 <= r.random() <= float(p[: tokens[i] + 1].sum()) + 1e-4


def test_a_row_draws_the_same_token_in_any_batch():
    rows = [row(seed=i, **options) for i, options in enumerate(OPTIONS * 3)]
    logits = torch.randn(len(rows), 3000)
    together = sample(logits, rows).tokens
    assert together == [sample(logits[i : i + 1], [r]).tokens[0] for i, r in enumerate(rows)]
    assert together == _sample_block(logits, rows).tokens, "all rows at once, as on a GPU"
    assert together[::-1] == sample(logits.flip(0), rows[::-1]).tokens


def test_tokens_without_weight_are_not_drawn_by_the_smallest_number(monkeypatch):
    r = row()
    monkeypatch.setattr(r, "random", lambda: 0.0)
    assert _invert(torch.tensor([[0.0, 0.0, 2.0, 1.0, 0.0]]), [r]).tolist() == [[2]]
    monkeypatch.setattr(r, "random", lambda: 1 - 2.0**-53)
    assert _invert(torch.tensor([[0.0, 0.0, 2.0, 1.0, 0.0]]), [r]).tolist() == [[3]]


def test_weights_do_not_depend_on_the_place_in_the_batch():
    x = torch.randn(1, 4999) * 5
    batch = x.repeat(7, 1)
    assert torch.equal(batch.exp(), x.exp().expand(7, -1))
    assert torch.equal(
        batch.exp().cumsum(-1, dtype=torch.float64), x.exp().cumsum(-1, dtype=torch.float64).expand(7, -1)
    )


def test_transformers_processors_agree():
    transformers = pytest.importorskip("transformers")
    logits, ids = torch.randn(1, VOCAB) * 4, torch.tensor([[5, 6, 7, 7, 250]])
    for processor, options in (
        (transformers.RepetitionPenaltyLogitsProcessor(1.8), {"repetition_penalty": 1.8}),
        (transformers.TemperatureLogitsWarper(0.6), {"temperature": 0.6}),
        (transformers.TopKLogitsWarper(9), {"top_k": 9}),
        (transformers.TopPLogitsWarper(0.7), {"top_p": 0.7}),
        (transformers.MinPLogitsWarper(0.1), {"min_p": 0.1}),
    ):
        expected = processor(ids, logits.clone()).softmax(-1)[0].double()
        torch.testing.assert_close(oracle(logits[0], row(ids[0].tolist(), **options)), expected, atol=1e-6, rtol=1e-5)


def test_end_tokens_bad_words_and_masks_are_never_chosen():
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[8, 10, 11, 12]] = True
    logits = torch.zeros(1, VOCAB)
    logits[0, 8], logits[0, 12], logits[0, 99] = 9, 6, 20
    assert sample(logits, [row(temperature=0.0)]).tokens == [99]
    assert sample(logits, [row(temperature=0.0, mask=lambda: allowed)]).tokens == [8]
    early = {"temperature": 0.0, "min_tokens": 4, "max_tokens": 9, "end_ids": {8, 99}}
    assert sample(logits, [row([1, 2, 3, 4, 5], **early)]).tokens == [12]
    assert sample(logits, [row([1, 2, 3, 4, 5, 6], **early)]).tokens == [99]

    def forbidden(output):
        return [99, 8] if output[-1:] == [3] else [99]

    for output, expected in (([], 8), ([3], 12), ([3, 4], 8)):
        state = row([1, 2, *output], temperature=0.0, forbidden=forbidden)
        assert sample(logits, [state]).tokens == [expected]


def test_logprobs_are_of_the_raw_logits():
    logits = torch.randn(3, VOCAB)
    rows = [row(temperature=0.0, logprobs=3, logit_bias={17: 100.0}), row(), row(logprobs=0, top_k=1)]
    tokens, found = sample(logits, rows)
    expected = logits.log_softmax(-1)
    assert tokens[0] == 17 and found[1] is None and len(found[2]) == 1
    order = expected[0].argsort(descending=True).tolist()
    token, value, rank = found[0][0]
    assert (token, rank) == (17, order.index(17) + 1) and value == pytest.approx(float(expected[0, 17]))
    assert [(t, r) for t, _, r in found[0][1:]] == [(t, i + 1) for i, t in enumerate(order[:3])]
    assert found[2][0] == (tokens[2], pytest.approx(float(expected[2].max())), 1)


def test_random_numbers_are_philoxs_and_uniform():
    for counter, key in (((0, 0, 0, 0), (0, 0)), ((7, 2**32 - 1, 3, 9), (123456789, 2**31))):
        expected = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
        assert list(philox4x32(counter, key)) == expected.tolist()
    draws = torch.tensor([uniform(2**40 + 5, i % 3, i) for i in range(20000)])
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    assert abs(float(draws.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / 20000)
    assert torch.histc(draws, 10, 0, 1).sub(2000).abs().max() < 5 * math.sqrt(1800)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"temperature": -1}, "temperature=-1 must be between 0 and"),
        ({"top_p": 0}, "top_p=0 must be above 0 and at most 1"),
        ({"top_k": -2}, "top_k=-2 must be -1 or more"),
        ({"max_tokens": 0}, "max_tokens=0 must be 1 or more"),
        ({"n": 3, "best_of": 2}, "best_of=2 must be at least n=3"),
        ({"best_of": 2, "temperature": 0}, "draws the same sample each time"),
        ({"min_tokens": 20}, "min_tokens=20 must be at most max_tokens=16"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 must be above 0"),
        ({"stop": [""]}, "none of them empty"),
        ({"logit_bias": {3: 101}}, "logit_bias has 3: 101"),
        ({"num_beams": 2, "n": 3}, "n=3 must be at most num_beams=2"),
        ({"num_beams": 2, "top_k": 3}, "top_k=3 cannot be combined with num_beams=2"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature=0.5 has no meaning with num_beams=2"),
        ({"regex": "a", "json_schema": {}}, "json_schema and regex are both given"),
        ({"regex": "a", "stop": "b"}, "stop='b' cannot be combined with regex"),
        ({"json_schema": "{"}, "json_schema is not valid JSON"),
        ({"early_stopping": "now"}, "early_stopping='now' must be True, False"),
        ({"seed": -1}, "seed=-1 must be between 0 and"),
    ],
)
def test_wrong_parameters_are_sentences(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**options)


def test_wrong_types_are_sentences():
    with pytest.raises(TypeError, match="max_tokens=1.5 must be an int, not float"):
        SamplingParams(max_tokens=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_most_probable_token_is_torchs_argmax(dtype):
    logits = torch.randn(6, 501, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, [17, 400]] = 50  # of equal ones the first
    logits[1, 100] = float("nan")
    logits[2, 9] = float("inf")
    logits[3] = -float("inf")
    logits[4, :-1] = -float("inf")
    rows = [SamplingState(SamplingParams(temperature=0), [1]) for _ in logits]
    expected = [17, -1, -1, -1, 500, int(logits[5].argmax())]
    assert sample(logits, rows).tokens == expected
    assert sample(logits[:, 1:].t().contiguous().t(), rows).tokens[4:] == [499, int(logits[5, 1:].argmax())]
