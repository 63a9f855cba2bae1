"""Causal language models against transformers with the same random weights, through a saved folder, with and without a cache."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import foveate
from compare import assert_as_good_as_torch
from foveate.bench.tolerance import model_floor
from foveate.models import load_model
from model_cases import assert_logits_close, new_cache, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, S = 97, 21
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear_rope": ("Llama", {"rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3_biases": ("Qwen3", {"attention_bias": True}),
    "gemma2": ("Gemma2", {"sliding_window": 7, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0,
                          "final_logit_softcapping": 3.0}),
    "gemma2_no_softcap": ("Gemma2", {"sliding_window": 4, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gpt2": ("GPT2", {}),
    "gpt2_scales": ("GPT2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu", "n_inner": 40,
                             "tie_word_embeddings": False}),
}  # fmt: skip


def theirs(name: str) -> Any:
    kind, changes = CASES[name]
    sizes = SIZES
    if kind == "GPT2":
        sizes = {"vocab_size": VOCAB, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = getattr(transformers, f"{kind}Config")(**(sizes | changes), attn_implementation="eager")
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
    randomize(model)
    return model.eval()


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """(transformers' model, ours loaded from what it saved)"""
    model = theirs(request.param)
    model.save_pretrained(tmp_path)
    return model, load_model(tmp_path)


def test_logits_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    tokens = torch.randint(VOCAB, (2, S))
    with torch.no_grad():
        expected = model(tokens).logits
        assert_logits_close(ours(tokens), expected)
        assert_logits_close(ours.logits(ours.hidden(tokens)), expected)


def test_gradients_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    tokens = torch.randint(1, VOCAB, (2, S))  # transformers keeps the gradient of the padding token, 0, at zero
    upstream = torch.randn(2, S, VOCAB)
    (model(tokens).logits * upstream).sum().backward()
    (ours(tokens) * upstream).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    names = [name for name, _ in ours.named_parameters()]
    assert sorted(names) == sorted(expected)
    for name, p in ours.named_parameters():
        theirs_ = expected[name].T if ours.transposed and ours.transposed.fullmatch(name) else expected[name]
        assert (p.grad - theirs_).abs().max() <= 1e-4 * theirs_.abs().max(), name


def test_prefill_and_decode_equal_one_pass(pair: tuple[Any, Any]) -> None:
    """Two sequences of other lengths, in chunks and single steps, alone and together."""
    _, ours = pair
    tokens = torch.randint(VOCAB, (2, S))
    with torch.inference_mode():
        whole = ours.hidden(tokens)
        cache = new_cache(ours.config)
        a, b = cache.create(), cache.create()

        def step(seqs: list[int], tokens: torch.Tensor) -> torch.Tensor:
            cache.append(seqs, tokens.shape[1])
            return ours.hidden(tokens, foveate.CacheView(cache, seqs, tokens.shape[1]))

        got_a = [step([a], tokens[:1, :7]), step([a], tokens[:1, 7:12])]
        got_b = [step([b], tokens[1:, :9])]
        for i in range(9):  # b is three tokens behind
            both = step([b, a], torch.stack([tokens[1, 9 + i], tokens[0, 12 + i]])[:, None])
            got_b.append(both[:1])
            got_a.append(both[1:])
        assert_logits_close(torch.cat(got_a, 1), whole[:1])
        assert_logits_close(torch.cat(got_b, 1), whole[1:, :18])


@pytest.mark.parametrize("name", ["llama_tied", "gemma2", "qwen3", "gpt2"])
def test_bf16_is_as_good_as_transformers_bf16(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    randomize(model, 0.15)
    model = model.bfloat16()
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.lm_head.weight.dtype is torch.bfloat16
    tokens = torch.randint(VOCAB, (2, S))
    with torch.no_grad():
        exact = load_model(tmp_path, dtype=torch.float64)(tokens)
        floor = model_floor(exact, model.config.hidden_size, model.config.num_hidden_layers, torch.bfloat16)
        assert_as_good_as_torch(ours(tokens), exact, model(tokens).logits, floor=floor)


def test_more_tokens_than_positions_are_refused(tmp_path: Path) -> None:
    for name in ("llama", "gpt2"):
        theirs(name).save_pretrained(tmp_path / name)
        ours = load_model(tmp_path / name)
        with pytest.raises(ValueError, match="65 tokens do not fit the model's 64 positions"):
            ours.hidden(torch.zeros(1, 65, dtype=torch.long))


def test_tied_weights_are_one_parameter(tmp_path: Path) -> None:
    theirs("llama_tied").save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert len(list(ours.parameters())) == len({id(p) for p in ours.parameters()})


def test_dropout_only_in_training(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path / "gpt2")
    model = theirs("llama")
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "llama")
    tokens = torch.randint(VOCAB, (2, S))
    for name in ("gpt2", "llama"):
        ours = load_model(tmp_path / name)
        assert torch.equal(ours(tokens), ours(tokens))
        ours.train()
        assert not torch.equal(ours(tokens), ours(tokens))


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "gpt2"])
def test_models_compile_without_graph_breaks(name: str, tmp_path: Path) -> None:
    theirs(name).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    tokens = torch.randint(1, VOCAB, (2, S))
    expected, got = ours(tokens), compiled(tokens)
    assert_logits_close(got, expected)
    (expected.square().sum()).backward()
    grads = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    got.square().sum().backward()
    for p, grad in zip(ours.parameters(), grads):
        assert (p.grad - grad).abs().max() <= 1e-4 * grad.abs().max()
