"""What the families of decoders differ in, in the native decoder: each against the torch modules, and itself in other batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_native_decoder import PROMPTS, SIZES, assert_right, exact_twin, generate, quantized

import foveate
from foveate.models.experts import ExpertsConfig
from foveate.models.llama import Llama, LlamaConfig
from foveate.models.native_decoder import NativeDecoder

pytestmark = [pytest.mark.kernels, pytest.mark.linear_kernels]

ROPES = {"rope_layers": ("local", "global", "none"), "local_rope_theta": 500.0, "rope_theta": 1e5}
DENSE: dict[str, dict[str, Any]] = {
    "alibi": {"alibi": True, "embed_norm": True, "norm": "layer_bias", "gated": False, "activation": "gelu", "windows": (7, None, 7)},
    "parallel": {"parallel": "one", "norm": "layer", "qk_norm": "layer_heads", "rope_interleaved": True, "logit_scale": 0.3},
    "parallel_two": {"parallel": "two", "norm": "layer_bias", "gated": False, "activation": "gelu", "rotary_dim": 8, "mlp_bias": True},
    "plain_norm": {"norm": "plain", "clip_qkv": 0.4, "activation": "relu2", "gated": False},
    "norms_behind": {"pre_norms": False, "post_norms": True, "qk_norm": "rms_all", **ROPES},
    "residual_scale": {"residual_scale": 0.4, "post_norms": True, "scale": 0.3, "embed_scale": 3.0, "o_bias": True},
    "residual_scale_alone": {"residual_scale": 0.4, "activation": "tanh"},
    "norm_after_rope": {"qk_norm": "rms", "qk_norm_after_rope": True, "rotary_dim": 12},
    "layer_norms_of_heads": {"qk_norm": "layer_bias", "qk_norm_after_rope": True, "rope_interleaved": True},
    "sinks": {"sinks": True, "windows": (6, None, 6), "mlp_bias": True, "swiglu_limit": 1.5},
}  # fmt: skip
EXPERTS: dict[str, dict[str, Any]] = {
    "softmax": {"experts": ExpertsConfig(6, 2, 32, normalize=True)},
    "top": {"experts": ExpertsConfig(5, 3, 32, router="top", router_bias=True), "swiglu_limit": 1.5, "mlp_bias": True, "sinks": True},
    "shared": {"experts": ExpertsConfig(4, 2, 32, shared_inner=64, shared_gate=True), "expert_layers": (True, False, True)},
    "sigmoid": {"experts": ExpertsConfig(8, 3, 32, router="sigmoid", normalize=True, scale=2.5, groups=4, top_groups=2, shared_inner=32)},
    "groups": {"experts": ExpertsConfig(8, 2, 32, scale=0.7, groups=2, top_groups=1), "residual_scale": 0.4, "gated": False},
    "norms_behind": {"experts": ExpertsConfig(4, 1, 32), "post_norms": True, "qk_norm": "rms_all"},
}  # fmt: skip


def make(settings: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    model = Llama(LlamaConfig(**{**SIZES, **settings}))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("name", [*DENSE, *(f"experts_{name}" for name in EXPERTS)])
def test_equals_the_modules(name: str) -> None:
    model = make(DENSE[name] if name in DENSE else EXPERTS[name.removeprefix("experts_")])
    twin, theirs = exact_twin(model), generate(model)
    native = NativeDecoder(model)
    mine = generate(native)
    assert_right(mine, theirs, twin)
    threads = torch.get_num_threads()
    try:  # the same bits alone as in the batch, whatever the number of threads is
        for i, count in enumerate((1, 3, 2, 1, 2)):
            torch.set_num_threads(count)
            (alone,) = generate(native, PROMPTS[i : i + 1], first=i)
            assert torch.equal(alone, mine[i]), f"sequence {i}, {count} threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["parallel", "norms_behind", "sinks"])
def test_packed_weights_and_a_quantised_cache(name: str, format: str) -> None:
    model = quantized(make(DENSE[name]), format)
    twin, theirs = exact_twin(model), generate(model, dtype=torch.int8)
    assert_right(generate(NativeDecoder(model), dtype=torch.int8), theirs, twin)


@pytest.mark.parametrize("format", ["q8_0", "bf16"])
@pytest.mark.parametrize("router", ["softmax", "top", "sigmoid"])
def test_packed_experts(router: str, format: str) -> None:
    """All experts are chosen: rounding to 8 bits would flip a choice now and then, and then nothing agrees."""
    experts = ExpertsConfig(4, 4, 32, router=router, normalize=True, shared_inner=32)
    model = make({"experts": experts})
    model = model.to(torch.bfloat16) if format == "bf16" else quantized(model, format)
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    twin, theirs = exact_twin(model), generate(model, dtype=dtype)
    native = NativeDecoder(model)
    mine = generate(native, dtype=dtype)
    assert_right([h.to(dtype) for h in mine], theirs, twin)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = generate(native, (prompt,), first=i, dtype=dtype)
        assert torch.equal(alone, mine[i])


@torch.no_grad()
def test_more_tokens_than_experts_take_at_once() -> None:
    """Prompts go through the experts in chunks; a token has the same bits in any."""
    settings = {"experts": ExpertsConfig(6, 5, 32), "max_positions": 1200, "num_layers": 1, "windows": (None,)}
    native = NativeDecoder(make(settings))
    tokens = torch.randint(0, 97, (1, 1100), generator=torch.Generator().manual_seed(0))
    hidden = []
    for parts in ((1100,), (500, 600)):
        cache = foveate.PagedKVCache(70, 16, num_kv_heads=2, head_dim=16, num_layers=1, dtype=torch.float32)
        seq, at, out = cache.create(), 0, []
        for n in parts:
            cache.append([seq], n)
            out.append(native.hidden(tokens[:, at : at + n], foveate.CacheView(cache, [seq], n)))
            at += n
        hidden.append(torch.cat(out, 1))
    assert torch.equal(*hidden)


@torch.no_grad()
@pytest.mark.parametrize("name", ["experts_top", "experts_sigmoid", "sinks", "parallel"])
def test_changed_weights_are_the_ones_that_run(name: str) -> None:
    settings = DENSE[name] if name in DENSE else EXPERTS[name.removeprefix("experts_")]
    native = NativeDecoder(make(settings))
    before = generate(native, ((9,),))[0]
    native.model.share_memory()
    assert torch.equal(generate(native, ((9,),))[0], before)
    state = {key: value.clone() for key, value in native.model.state_dict().items()}
    for key, value in state.items():
        if any(part in key for part in ("gate.weight", "sinks", "correction_bias", "q_norm")):
            value.mul_(-2.0)
    native.model.load_state_dict(state)
    after = generate(native, ((9,),))[0]
    assert not torch.equal(after, before)
    assert torch.equal(after, generate(NativeDecoder(native.model), ((9,),))[0])


def test_mixed_experts_are_refused_by_their_name() -> None:
    model = make(EXPERTS["softmax"])
    layer = model.model.layers[1].mlp
    layer.experts[3].down_proj = foveate.nn.PackedLinear.from_linear(layer.experts[3].down_proj, "q8_0")
    assert "down_proj of the experts of model.layers.1.mlp are blocks and fp32" in str(NativeDecoder.unsupported(model))
