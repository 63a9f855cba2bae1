"""LoRA adapters beside a model: the log-probabilities of the merged one, in one batch with others, and of none with the base's bits."""

from __future__ import annotations

import json

import pytest
import torch

import foveate
import generation_toys as toys
from foveate import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0, prompt_logprobs=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The base, and two adapters."""
    base = toys.folder(tmp_path_factory.mktemp("base"))
    return [base, *(toys.adapter(tmp_path_factory.mktemp("adapter"), seed) for seed in (1, 2))]


@pytest.fixture
def llm(folders):
    made = foveate.LLM(folders[0], num_pages=96, page_size=4, progress=False)
    for name, folder in zip("ab", folders[1:]):
        made.load_adapter(name, folder)
    return made


def scores(output) -> list[float]:
    [sample] = output.outputs
    prompt = [entry[t].logprob for t, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])]
    return prompt + [entry[t].logprob for t, entry in zip(sample.token_ids, sample.logprobs)]


@pytest.mark.parametrize("name", ["a", "b"])
def test_it_gives_what_the_merged_model_gives(llm, folders, name):
    prompts = toys.prompts(3, 5, 40)
    merged = foveate.LLM(folders[0], adapter=folders["ab".index(name) + 1], num_pages=96, page_size=4, progress=False)
    for ours, theirs, base in zip(
        llm.generate(prompts, GREEDY, adapter=name), merged.generate(prompts, GREEDY), llm.generate(prompts, GREEDY)
    ):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids != base.outputs[0].token_ids
        torch.testing.assert_close(torch.tensor(scores(ours)), torch.tensor(scores(theirs)), atol=1e-3, rtol=1e-4)


def test_a_batch_of_all_of_them_gives_each_its_own(llm):
    """The tokens that each gives alone, and without an adapter the bits, with prompts that begin alike, so that pages would be shared if
    they could."""
    shared = toys.prompts(1, 16, 16)[0]
    asked = [(shared + tail, adapter) for tail in ([5], [7, 8]) for adapter in (None, "a", "b")]
    params = SamplingParams(temperature=0.9, max_tokens=10, seed=3, ignore_eos=True, logprobs=0)
    alone = [llm.generate([prompt], params, adapter=adapter)[0].outputs[0] for prompt, adapter in asked]
    assert len({tuple(sample.token_ids) for sample in alone[:3]}) == 3
    for i, (prompt, adapter) in enumerate(asked):
        llm.engine.add(str(i), prompt, params, adapter=adapter)
    together = toys.drain(llm.engine)
    for i, expected in enumerate(alone):
        [sample] = together[str(i)].outputs
        assert sample.token_ids == expected.token_ids
        assert sample.cumulative_logprob == expected.cumulative_logprob
    toys.check_pages(llm.engine)


def test_one_that_is_unloaded_finishes_what_runs(llm):
    prompt = toys.prompts(1, 9, 9)[0]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    expected = llm.generate([prompt], params, adapter="a")[0].outputs[0].token_ids
    llm.engine.add("x", prompt, params, adapter="a")
    llm.engine.step()
    llm.unload_adapter("a")
    assert toys.drain(llm.engine)["x"].outputs[0].token_ids == expected
    with pytest.raises(ValueError, match="no adapter 'a'; there are b"):
        llm.generate([prompt], params, adapter="a")


def test_one_that_is_replaced_finds_no_pages_of_the_old_one(llm, folders):
    prompt = toys.prompts(1, 20, 20)[0]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    llm.generate([prompt], params, adapter="a")
    other = llm.generate([prompt], params, adapter="b")[0].outputs[0].token_ids
    llm.load_adapter("a", folders[2])
    assert llm.generate([prompt], params, adapter="a")[0].outputs[0].token_ids == other


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"r": 5}, "damaged, or another model's"), ({"use_dora": True}, "use_dora=True"), ({"peft_type": "IA3"}, "only LORA"),
        ("lm_head", "attention and MLP only"), ("model.layers.7.mlp.up_proj", "another model's adapter"), (None, "has no adapter"),
    ],
)  # fmt: skip
def test_adapters_that_are_refused(llm, tmp_path, change, sentence):
    if change is not None:
        toys.adapter(tmp_path, 1, layer=change if isinstance(change, str) else None)
    if isinstance(change, dict):
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        llm.load_adapter("c", tmp_path)
    assert llm.engine.adapters.names == ["a", "b"]
