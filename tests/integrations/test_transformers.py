"""attn_implementation="foveate" inside real transformers models with small random configs, against their own eager attention.

Logits are compared at the tokens that are no padding, gradients of every parameter; each case proves that foveate served every
attention layer. Both sides compute in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import AttentionInterface


import foveate
from foveate.integrations import transformers as integration

B, S, VOCAB = 2, 13, 97
LAYERS = 2


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """(function, options) of each call of foveate's attention made by the integration."""
    seen: list[tuple[str, dict[str, Any]]] = []

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(foveate, name)

        def function(*args: Any, **options: Any) -> Any:
            seen.append((name, options))
            return original(*args, **options)

        return function

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(foveate, name, spy(name))
    return seen


def build(kind: str, **changes: Any) -> torch.nn.Module:
    """A random model of two layers. Weights are larger than the usual initialisation, so that attention is far from uniform."""
    t = transformers
    rope = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": LAYERS,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
    table: dict[str, tuple[type, type, dict[str, Any]]] = {
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, {
            "vocab_size": VOCAB, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0,
            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": None}),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig, rope),
        "mistral": (t.MistralForCausalLM, t.MistralConfig, {**rope, "sliding_window": 5}),
        "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config, {
            **rope, "sliding_window": 5, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}),
        "gpt_oss": (t.GptOssForCausalLM, t.GptOssConfig, {
            **rope, "sliding_window": 5, "num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}),
        "bert": (t.BertForMaskedLM, t.BertConfig, {
            "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
        "t5": (t.T5ForConditionalGeneration, t.T5Config, {
            "vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 48, "num_layers": LAYERS, "num_heads": 4,
            "dropout_rate": 0.0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
            "decoder_start_token_id": 0, "eos_token_id": None}),
    }  # fmt: skip
    model_class, config_class, settings = table[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**{**settings, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 or "sinks" in name:
                parameter.normal_(std=0.2)
    return model


def ids(rows: int = B, length: int = S) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> torch.Tensor:
    mask = torch.ones(B, S, dtype=torch.long)
    if side == "left":
        mask[1, :4] = 0
    elif side == "right":
        mask[1, -4:] = 0
    return mask


def logits_and_gradients(
    model: torch.nn.Module, implementation: str, inputs: dict[str, Any], keep: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(**inputs).logits[keep]
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_like_eager(model: torch.nn.Module, inputs: dict[str, Any], keep: torch.Tensor | None = None) -> None:
    """Eager attention rounds its softmax to fp32 even in fp64 models, so there is no exact result to measure both against.

    Gradients: eager's own distance from fp64, where that exists, is 4e-5 of the largest entry in T5 (unscaled scores) and 3e-6 in
    GPT-2. Some are zero by symmetry (BERT's key bias): those get the rounding of the largest gradient of the model.
    """
    keep = torch.ones(B, S, dtype=torch.bool) if keep is None else keep.bool()
    expected, expected_gradients = logits_and_gradients(model, "eager", inputs, keep)
    logits, gradients = logits_and_gradients(model, "foveate", inputs, keep)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    for name, expected_gradient in expected_gradients.items():
        error = float((gradients[name] - expected_gradient).abs().max())
        limit = 5e-5 * float(expected_gradient.abs().max()) + 1e-6 * largest
        assert error <= limit, f"gradient of {name}: error {error:.1e}, limit {limit:.1e}"


DECODERS = ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", [*DECODERS, "bert"])
def test_logits_and_gradients(kind: str, side: str, calls: list[Any]) -> None:
    mask = padding(side)
    inputs = {"input_ids": ids(), "attention_mask": mask}
    if kind != "bert":
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    assert_like_eager(build(kind), inputs, mask)
    assert [name for name, _ in calls] == ["attention"] * LAYERS


def test_plain_causal_needs_no_mask(calls: list[Any]) -> None:
    assert_like_eager(build("llama"), {"input_ids": ids()})
    assert all(options["causal"] and options["mask"] is None for _, options in calls)
    assert len(calls) == LAYERS


def test_options_reach_the_kernel(calls: list[Any]) -> None:
    assert_like_eager(build("gemma2"), {"input_ids": ids()})
    assert {options["softcap"] for _, options in calls} == {3.0}
    masked = [options["mask"] is not None or options["bias"] is not None for _, options in calls]
    assert sorted(masked) == [False, True]  # one layer of each kind: full and sliding
    calls.clear()
    assert_like_eager(build("gpt_oss"), {"input_ids": ids()})
    assert all(options["sinks"] is not None for _, options in calls)


@pytest.mark.parametrize("side", ["none", "right"])
def test_t5_position_bias_and_its_gradient(side: str, calls: list[Any]) -> None:
    model, mask = build("t5"), padding(side)
    inputs = {"input_ids": ids(), "attention_mask": mask, "decoder_input_ids": ids(B, 7)}
    assert_like_eager(model, inputs, torch.ones(B, 7))
    assert len(calls) == 3 * LAYERS  # encoder, decoder, cross-attention
    assert all(options["bias"] is not None and options["scale"] == 1.0 for _, options in calls)
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert table.grad.abs().max() > 1e-3
    assert model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.grad.abs().max() > 1e-3


def test_packed_position_ids_do_not_leak(calls: list[Any]) -> None:
    """Two sequences in one row, told apart by the restart of position_ids, give what each gives alone."""
    model, tokens = build("llama"), ids(1, 11)
    positions = torch.tensor([[*range(4), *range(7)]])
    assert_like_eager(model, {"input_ids": tokens, "position_ids": positions, "use_cache": False}, torch.ones(1, 11))
    packed = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=part).logits for part in (tokens[:, :4], tokens[:, 4:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_cu_seq_lens_take_the_packed_kernel(calls: list[Any]) -> None:
    """With an all-ones mask position_ids say nothing to transformers; cu_seq_lens do."""
    model, tokens = build("llama"), ids(1, 11)
    model.set_attn_implementation("foveate")
    cu = torch.tensor([0, 4, 11], dtype=torch.int32)
    positions = torch.tensor([[*range(4), *range(7)]])
    packed = model(
        input_ids=tokens, attention_mask=torch.ones(1, 11), position_ids=positions, use_cache=False,
        cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=7, max_length_k=7,
    ).logits  # fmt: skip
    assert [name for name, _ in calls] == ["attention_varlen"] * LAYERS
    alone = torch.cat([model(input_ids=part).logits for part in (tokens[:, :4], tokens[:, 4:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


def test_four_dimensional_masks_are_complete(calls: list[Any]) -> None:
    keep = torch.rand(B, 1, S, S, generator=torch.Generator().manual_seed(3)) < 0.5
    keep |= torch.eye(S, dtype=torch.bool)
    model = build("llama")
    model.set_attn_implementation("foveate")
    additive = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    from_bool = model(input_ids=ids(), attention_mask=keep).logits
    from_float = model(input_ids=ids(), attention_mask=additive).logits
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids(), attention_mask=additive).logits
    torch.testing.assert_close(from_bool, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(from_float, expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * LAYERS


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", DECODERS)
def test_generate(kind: str, cache: str, calls: list[Any]) -> None:
    """Greedy tokens of a left-padded batch, and the logits of each step, with either cache."""
    model, mask = build(kind), padding("left")
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True,
                "cache_implementation": None if cache == "dynamic" else "static", "disable_compile": True}  # fmt: skip
    results = {}
    for implementation in ("eager", "foveate"):
        model.set_attn_implementation(implementation)
        results[implementation] = model.generate(ids(), attention_mask=mask, pad_token_id=0, **settings)
    assert len(calls) == 5 * LAYERS
    assert torch.equal(results["foveate"].sequences, results["eager"].sequences)
    for step, expected in zip(results["foveate"].logits, results["eager"].logits):
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)


def test_generate_t5(calls: list[Any]) -> None:
    model, mask = build("t5"), padding("right")
    tokens = {}
    for implementation in ("eager", "foveate"):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(ids(), attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens["foveate"], tokens["eager"])
    assert len(calls) == LAYERS + 5 * 2 * LAYERS  # the encoder once, then self- and cross-attention at each step


def test_first_step_on_an_empty_static_cache_slices_the_keys(calls: list[Any]) -> None:
    """Causal is bottom-right in foveate, and the slots of a static cache that nothing has filled come after the queries."""
    model = build("llama")
    model.set_attn_implementation("foveate")
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    logits = model(input_ids=ids(), past_key_values=cache).logits
    assert all(options["mask"] is None and options["causal"] for _, options in calls)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits, model(input_ids=ids()).logits, rtol=1e-4, atol=1e-5)


def test_dropout_only_while_training(calls: list[Any]) -> None:
    model = build("gpt2", attn_pdrop=0.5)
    model.set_attn_implementation("foveate")
    assert torch.equal(model(input_ids=ids()).logits, model(input_ids=ids()).logits)
    model.train()
    torch.manual_seed(0)
    first = model(input_ids=ids()).logits
    assert not torch.equal(first, model(input_ids=ids()).logits)
    torch.manual_seed(0)
    assert torch.equal(first, model(input_ids=ids()).logits)
    assert {options["dropout_p"] for _, options in calls} == {0.0, 0.5}


def test_half_precision_stays_near_fp32(calls: list[Any]) -> None:
    model = build("llama").bfloat16()
    model.set_attn_implementation("foveate")
    ours = model(input_ids=ids()).logits.float()
    model.set_attn_implementation("eager")
    theirs = model(input_ids=ids()).logits.float()
    exact = model.float()(input_ids=ids()).logits
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


def attention_inputs() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, None]:
    q, k, v = (torch.randn(1, heads, length, 8) for heads, length in ((4, 4), (2, 6), (2, 6)))
    return torch.nn.Identity(), q, k, v, None


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"output_attentions": True}, ValueError, "never stores the attention weights"),
        ({"cache": object()}, ValueError, "continuous batching"),
        ({"wavelets": torch.zeros(1)}, TypeError, "Identity passes wavelets to its attention function"),
        ({"indices": torch.zeros(1)}, ValueError, r"indices has dtype torch.float32 and shape \[1\]"),
        ({"block_indices": torch.zeros(1)}, TypeError, "no indexer.block_size"),
        ({"is_causal": True}, ValueError, "4 queries, 6 keys and no mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, ValueError, "without cu_seq_lens_k"),
    ],
)
def test_refuses_what_it_cannot_honour(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        integration.attention_forward(*attention_inputs(), **options)


def test_refuses_masks_of_other_ranks_and_types() -> None:
    module, q, k, v, _ = attention_inputs()
    with pytest.raises(ValueError, match=r"reached the attention layer as \[1, 4\]"):
        integration.attention_forward(module, q, k, v, torch.ones(1, 4))
    with pytest.raises(TypeError, match=r"torch\.int64; a 4-D mask is bool"):
        integration.attention_forward(module, q, k, v, torch.ones(1, 1, 4, 4, dtype=torch.long))


def test_output_attentions_raises_inside_a_model() -> None:
    model = build("llama")
    model.set_attn_implementation("foveate")
    with pytest.raises(ValueError, match=r"output_attentions|attention weights|eager"):
        model(input_ids=ids(), output_attentions=True)


def test_registering_twice_is_harmless() -> None:
    integration.register()
    assert AttentionInterface._global_mapping["foveate"] is integration.attention_forward
