"""Beam search: ids and scores are those of transformers' generate, for decoders on random weights."""

from __future__ import annotations

import pytest
import torch

from foveate.generation.beam import BeamSearch

pytestmark = pytest.mark.usefixtures("one_thread")

transformers = pytest.importorskip("transformers")

VOCAB = 23


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.6, bos_token_id=0, eos_token_id=[3], pad_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def search_with(model, prompts, num_beams, new, eos, min_tokens=0, **options):
    """Beam search without a cache: every step runs the whole sequences."""
    search = BeamSearch(len(prompts), num_beams, new, eos, **options)
    rows = prompts.repeat_interleave(num_beams, 0)
    with torch.no_grad():
        while not search.done:
            log_probs = model(rows).logits[:, -1].float().log_softmax(-1)
            if search.length < min_tokens:
                log_probs[:, list(eos)] = -torch.inf
            parents, tokens = search.step(log_probs)
            rows = torch.cat([rows[parents], tokens[:, None]], 1)
    return search.results()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-0.7, 0.0, 1.0, 2.5])
@pytest.mark.parametrize("num_beams, eos", [(2, [3]), (4, [3, 7, 11])])
def test_hypotheses_equal_those_of_transformers(llama, early_stopping, length_penalty, num_beams, eos):
    prompts = torch.randint(4, VOCAB, (3, 5))
    ended_early = 0
    found = search_with(
        llama, prompts, num_beams, 9, set(eos), length_penalty=length_penalty, early_stopping=early_stopping
    )
    expected = llama.generate(
        prompts, attention_mask=torch.ones_like(prompts), num_beams=num_beams, num_return_sequences=num_beams, do_sample=False,
        max_new_tokens=9, eos_token_id=eos, length_penalty=length_penalty, early_stopping=early_stopping,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for i, hypothesis in enumerate(h for item in found for h in item):
        length = len(hypothesis.tokens)
        ended_early += length < 9
        assert hypothesis.tokens == expected.sequences[i, 5 : 5 + length].tolist()
        assert expected.sequences[i, 5 + length :].tolist() == [1] * (expected.sequences.shape[1] - 5 - length)
        assert hypothesis.score == pytest.approx(float(expected.sequences_scores[i]), abs=1e-4)
    assert ended_early > 0 or length_penalty > 0  # a positive penalty favours the longest


def test_each_prompt_is_searched_as_if_alone(llama):
    prompts = torch.randint(4, VOCAB, (4, 5))
    together = search_with(llama, prompts, 3, 8, {3})
    alone = [search_with(llama, prompt[None], 3, 8, {3})[0] for prompt in prompts]
    assert [[h.tokens for h in item] for item in together] == [[h.tokens for h in item] for item in alone]


def test_enough_beams_find_the_most_probable_sequence():
    """With as many beams as there are sequences, the search is exhaustive."""
    table = torch.randn(4, 4).log_softmax(-1)  # of the next token, by the last one; token 0 starts
    search = BeamSearch(1, 64, 3, set(), length_penalty=0.0)
    last = torch.zeros(64, dtype=torch.long)
    while not search.done:
        _, last = search.step(table[last])
    best = search.results(1)[0][0]
    paths = torch.cartesian_prod(*[torch.arange(4)] * 3)
    scores = table[0, paths[:, 0]] + table[paths[:, 0], paths[:, 1]] + table[paths[:, 1], paths[:, 2]]
    assert best.tokens == paths[scores.argmax()].tolist()
    assert best.score == pytest.approx(float(scores.max()), abs=1e-5)


def test_wrong_arguments_are_sentences():
    with pytest.raises(ValueError, match="num_beams=0 must be 1 or more"):
        BeamSearch(1, 0, 3, {1})
    with pytest.raises(ValueError, match='must be True, False or "never"'):
        BeamSearch(1, 2, 3, {1}, early_stopping="sometimes")
    search = BeamSearch(1, 2, 1, {1})
    with pytest.raises(ValueError, match=r"must be \[batch \* num_beams, vocab\] with 2 rows"):
        search.step(torch.zeros(3, 5))
    search.step(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="the search is done"):
        search.step(torch.zeros(2, 5))
