"""Which keys a query sees when attn_implementation="foveate": what eager attention of the same model lets it see."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers as t

from foveate.integrations import transformers as integration
from foveate.integrations.transformers.causal_mask import CausalMask, stored

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def registered() -> None:
    integration.register()


def ids(length: int = 9) -> torch.Tensor:
    return torch.randint(2, 90, (2, length), generator=torch.Generator().manual_seed(0))


def prepared(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
            elif "gate" in name:
                parameter.fill_(1.0)
    return model.eval()


def assert_as_eager(model: Any, call: Any) -> None:
    results = {}
    for implementation in ("eager", "foveate"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results[implementation] = call()
    torch.testing.assert_close(results["foveate"], results["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ClapText", "AlignText", "LayoutLM", "MarkupLM", "Splinter"])
def test_encoders_whose_attention_says_nothing_are_not_causal(kind: str) -> None:
    model = prepared(getattr(t, f"{kind}Model")(getattr(t, f"{kind}Config")(**BERT)))
    more = {"bbox": torch.zeros(2, 9, 4, dtype=torch.long)} if kind == "LayoutLM" else {}
    assert_as_eager(model, lambda: model(input_ids=ids(), **more)[0])
    padded = torch.ones(2, 9, dtype=torch.long)
    padded[1, 6:] = 0
    assert_as_eager(model, lambda: model(input_ids=ids(), attention_mask=padded, **more)[0][padded.bool()])


def test_a_decoder_whose_attention_says_nothing_is_causal() -> None:
    model = prepared(t.DogeForCausalLM(t.DogeConfig(**SMALL, num_key_value_heads=2)))
    assert_as_eager(model, lambda: model(input_ids=ids())[0])


def test_cross_attention_that_calls_itself_causal_sees_every_key() -> None:
    """LightGlue's attention module has is_causal=True, and passes no mask when it attends to the other image."""
    from transformers.models.lightglue.modeling_lightglue import LightGlueAttention

    config = t.LightGlueConfig(descriptor_dim=32, num_attention_heads=4, num_hidden_layers=2)
    attention = prepared(LightGlueAttention(config, 0))
    x, other = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    results = {}
    for config._attn_implementation in ("eager", "foveate"):
        results[config._attn_implementation] = attention(x, encoder_hidden_states=other)[0]
    torch.testing.assert_close(results["foveate"], results["eager"], rtol=1e-4, atol=1e-5)


def test_mllama_text_and_its_cross_attention() -> None:
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig
    from transformers.models.mllama.modeling_mllama import MllamaForCausalLM

    model = prepared(MllamaForCausalLM(MllamaTextConfig(**SMALL, num_key_value_heads=2, cross_attention_layers=[1])))
    states = torch.randn(2, 7, 32)
    assert_as_eager(model, lambda: model(input_ids=ids(), cross_attention_states=states, use_cache=False)[0])


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_no_mask_is_every_key(kind: str) -> None:
    """Fewer queries than keys and no mask: whoever dropped the queries, every key is visible, as in eager attention."""
    module = torch.nn.Identity()
    module.is_causal = kind == "self"  # type: ignore[assignment]
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    out, _ = integration.attention_forward(module, q, k, v, None, scaling=0.3)
    scores = (0.3 * q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, scores.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("Skv", "offset"), [(7, 0), (12, 0), (12, 3), (7, 3), (7, -2)])
@pytest.mark.parametrize("looked_into", [False, True])
def test_causal_mask(Skv: int, offset: int, looked_into: bool) -> None:
    """The mask that is not stored gives what the stored one gives, for static caches, chunks and sliding caches."""
    mask = CausalMask(2, 7, Skv, offset, "cpu")
    full = torch.ones(7, Skv, dtype=torch.bool).tril(offset)
    if looked_into:
        assert torch.equal(torch.where(mask, 1.0, 0.0)[0, 0], full.float())
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, Skv, 8), torch.randn(2, 2, Skv, 8)
    out, _ = integration.attention_forward(torch.nn.Identity(), q, k, v, mask)
    expected, _ = integration.attention_forward(torch.nn.Identity(), q, k, v, full.expand(2, 1, 7, Skv))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_what_a_model_does_to_the_causal_mask_counts() -> None:
    full = torch.ones(7, 7, dtype=torch.bool).tril()
    mask = CausalMask(2, 7, 7, 0, "cpu")
    assert mask.dtype is torch.bool and mask.ndim == 4 and mask.shape == (2, 1, 7, 7)
    assert mask.offset == 0, "looking at its shape and type stores nothing"
    assert torch.equal((~mask)[1, 0], ~full)
    assert torch.equal(mask[:, :, -2:, :5][0, 0], full[-2:, :5])
    written = mask[:, :, :, 6]  # a view
    written[:] = True
    assert mask.offset is None
    full[:, 6] = True
    assert torch.equal(stored(mask)[0, 0], full)
    q, k, v = (torch.randn(2, 2, 7, 8) for _ in range(3))
    out, _ = integration.attention_forward(torch.nn.Identity(), q, k, v, mask)
    expected, _ = integration.attention_forward(torch.nn.Identity(), q, k, v, full.expand(2, 1, 7, 7))
    torch.testing.assert_close(out, expected)


def test_the_mask_function_under_compile_stores_the_mask() -> None:
    model = prepared(t.LlamaForCausalLM(t.LlamaConfig(**SMALL, num_key_value_heads=2)))
    model.set_attn_implementation("foveate")
    with torch.no_grad():
        expected = model(input_ids=ids(), use_cache=False)[0]
        compiled = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids(), use_cache=False)[0]
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_sparse_attention_by_indices() -> None:
    """DeepSeek V3.2 and its kin hand over the keys that an indexer chose."""
    config = t.DeepseekV32Config(
        vocab_size=99, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, index_topk=4, index_n_heads=2, index_head_dim=32, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1,
    )  # fmt: skip
    model = prepared(t.DeepseekV32ForCausalLM(config))
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[1, :5] = 0
    for mask in (None, padded):
        keep = torch.ones(2, 12, dtype=torch.bool) if mask is None else mask.bool()
        assert_as_eager(model, lambda m=mask, keep=keep: model(input_ids=ids(12), attention_mask=m)[0][keep])


@pytest.mark.parametrize("groups", [1, 2])
def test_sparse_attention_by_blocks(groups: int) -> None:
    module = torch.nn.Identity()
    module.indexer = torch.nn.Identity()
    module.indexer.block_size = 3  # type: ignore[assignment]
    q, k, v = torch.randn(2, 4, 8, 8), torch.randn(2, 2, 8, 8), torch.randn(2, 2, 8, 8)
    chosen = torch.randint(-1, 3, (2, groups, 8, 2))
    chosen[..., 0] = 0
    keep = torch.zeros(2, groups, 8, 9, dtype=torch.bool)
    for b, group, i, n in torch.cartesian_prod(*map(torch.arange, chosen.shape)).tolist():
        block = int(chosen[b, group, i, n])
        if block >= 0:
            keep[b, group, i, 3 * block : 3 * block + 3] = True
    keep = keep[..., :8].repeat_interleave(4 // groups, 1)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    out, _ = integration.attention_forward(module, q, k, v, CausalMask(2, 8, 8, 0, "cpu"), block_indices=chosen)
    expected, _ = integration.attention_forward(module, q, k, v, keep & causal)
    torch.testing.assert_close(out, expected)


def test_a_sink_for_each_query_and_its_gradient() -> None:
    q, k, v = (torch.randn(2, 4, 6, 8, requires_grad=True) for _ in range(3))
    sinks = torch.randn(2, 4, 6, 1, requires_grad=True)
    keep = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (q @ k.mT * 8**-0.5).masked_fill(~keep, float("-inf"))
    expected = (torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v).transpose(1, 2)
    out, _ = integration.attention_forward(torch.nn.Identity(), q, k, v, CausalMask(2, 6, 6, 0, "cpu"), sinks=sinks)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(out.sin().sum(), (q, k, v, sinks))
    for got, want in zip(grads, torch.autograd.grad(expected.sin().sum(), (q, k, v, sinks))):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
