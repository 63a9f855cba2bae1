"""NativeDecoder against the torch modules of the same model, the exact result in fp64, and itself in other batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import foveate
from compare import assert_as_good_as_torch
from foveate.bench.tolerance import model_floor
from foveate.models.gpt2 import GPT2, GPT2Config
from foveate.models.llama import Llama, LlamaConfig
from foveate.models.native_decoder import NativeDecoder
from foveate.nn import PackedLinear

pytestmark = [pytest.mark.kernels, pytest.mark.linear_kernels]

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "max_positions": 128, "windows": (None,) * 3,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "tied": True, "activation": "gelu_pytorch_tanh", "windows": (9, None, 9), "scale": 0.2, "attn_softcap": 5.0, "final_softcap": 7.0,
    "norm_offset": 1.0, "post_norms": True, "embed_scale": 8.0,
}  # fmt: skip
LLAMAS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_biases": {"tied": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "mistral": {"windows": (5,) * 3, "activation": "relu"},
    "qwen2": {"tied": True, "qkv_bias": True, "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "rope_theta": 1e6, "head_dim": 24},
    "gemma2": GEMMA,
}
CASES = [*LLAMAS, "gpt2", "gpt2_untied"]


def make(name: str) -> Any:
    if name in LLAMAS:
        model: Any = Llama(LlamaConfig(**{**SIZES, **LLAMAS[name]}))
    else:
        sizes = {k: v for k, v in SIZES.items() if k not in ("windows", "num_kv_heads")}
        model = GPT2(GPT2Config(**sizes, num_kv_heads=4, tied=name == "gpt2", scales=(0.25, 0.3, 0.2)))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    return model.eval()


def quantized(model: Any, format: str) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, PackedLinear.from_linear(module, format))
    return model


def exact_twin(model: Any) -> Any:
    """The same model in fp64, with plain linear layers."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.dequantize()
            if module.bias is not None:
                linear.bias.data = module.bias
            twin.set_submodule(name, linear)
    return twin.double()


def new_cache(model: Any, dtype: torch.dtype = torch.float32) -> foveate.PagedKVCache:
    c = model.config
    return foveate.PagedKVCache(
        64, 16, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, num_layers=c.num_layers, dtype=dtype
    )


def tokens_of(length: int, seed: int) -> Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))


# Of each sequence: the lengths of the steps before all of them run together, for these many tokens at a time.
PROMPTS = ((40,), (7, 1, 12), (1,), (33, 3), (12,))
TOGETHER = (1, 1, 5, 1)


@torch.no_grad()
def generate(
    model: Any, prompts: tuple[tuple[int, ...], ...] = PROMPTS, first: int = 0, dtype=torch.float32
) -> list[Tensor]:
    """The hidden states of each sequence: prompts one by one in chunks, then steps in one ragged batch."""
    cache = new_cache(model, dtype)
    seqs, out, done = [], [], []
    for i, chunks in enumerate(prompts):
        text, parts, at = tokens_of(100, first + i), [], 0
        seqs.append(cache.create())
        for n in chunks:
            cache.append(seqs[-1:], n)
            parts.append(model.hidden(text[None, at : at + n], foveate.CacheView(cache, seqs[-1:], n))[0])
            at += n
        out.append(parts)
        done.append(at)
    for n in TOGETHER:
        cache.append(seqs, n)
        batch = torch.stack([tokens_of(100, first + i)[at : at + n] for i, at in enumerate(done)])
        hidden = model.hidden(batch, foveate.CacheView(cache, seqs, n))
        for i in range(len(seqs)):
            out[i].append(hidden[i])
            done[i] += n
    return [torch.cat(parts) for parts in out]


def assert_right(native: list[Tensor], model: list[Tensor], twin: Any) -> None:
    """Each sequence as near to the fp64 result of one pass without a cache as the modules are."""
    for i, (mine, theirs) in enumerate(zip(native, model)):
        exact = twin.hidden(tokens_of(100, i)[None, : len(mine)])[0].detach()
        floor = model_floor(exact, SIZES["intermediate_size"], SIZES["num_layers"], torch.float32)
        assert_as_good_as_torch(mine, exact, theirs, name=f"sequence {i}", floor=floor)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_modules(name):
    model = make(name)
    twin, theirs = exact_twin(model), generate(model)
    native = NativeDecoder(model)
    mine = generate(native)
    assert all(h.dtype == torch.float32 for h in mine)
    assert_right(mine, theirs, twin)
    text = tokens_of(9, 0)[None]
    logits = twin(text).detach()
    torch.testing.assert_close(native(text).double(), logits, rtol=1e-4, atol=1e-4)  # without a cache
    torch.testing.assert_close(native.logits(mine[0][:9]).double(), logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama_biases", "qwen3", "gemma2", "gpt2"])
def test_quantized_weights(name, format):
    model = quantized(make(name), format)
    twin, theirs = exact_twin(model), generate(model)
    assert_right(generate(NativeDecoder(model)), theirs, twin)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights(name, dtype):
    model = make(name).to(dtype)
    twin, theirs = exact_twin(model), generate(model, dtype=dtype)
    native = NativeDecoder(model)
    for cache_dtype in (dtype, torch.float32):
        assert_right([h.to(dtype) for h in generate(native, dtype=cache_dtype)], theirs, twin)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_cache(dtype):
    model = make("llama")
    twin, theirs = exact_twin(model), generate(model, dtype=dtype)
    assert_right(generate(NativeDecoder(model), dtype=dtype), theirs, twin)


@pytest.mark.parametrize("format", [None, "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_a_sequence_has_the_same_bits_in_any_batch_and_on_any_threads(name, format):
    model = make(name) if format is None else quantized(make(name), format)
    native = NativeDecoder(model)
    together = generate(native)
    saved = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for i, chunks in enumerate(PROMPTS):
                (alone,) = generate(native, (chunks,), first=i)
                assert torch.equal(alone, together[i]), f"sequence {i}, {threads} threads"
    finally:
        torch.set_num_threads(saved)


@torch.no_grad()
def test_long_contexts_are_divided_by_keys():
    """More than 2048 keys: the decode kernel splits them, and merges the parts."""
    model = Llama(LlamaConfig(**{**SIZES, "max_positions": 2304})).eval()
    length, hidden = 2100, []
    for runs in (model, NativeDecoder(copy.deepcopy(model))):
        cache = foveate.PagedKVCache(160, 16, num_kv_heads=2, head_dim=16, num_layers=3, dtype=torch.float32)
        seq = cache.create()
        for text in (tokens_of(length, 0), tokens_of(3, 1), tokens_of(1, 2)):
            cache.append([seq], len(text))
            hidden.append(runs.hidden(text[None], foveate.CacheView(cache, [seq], len(text)))[0, -3:])
    for theirs, mine in zip(hidden[:3], hidden[3:]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_packs_in_place():
    for name in ("llama", "qwen2", "gpt2", "gpt2_untied"):
        model = make(name)
        text = tokens_of(9, 0)[None]
        before, tied = model(text).detach(), model.config.tied
        native = NativeDecoder(model)
        assert not any(isinstance(m, nn.Linear) for m in model.modules())
        torch.testing.assert_close(model(text), before, rtol=1e-4, atol=1e-5)
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and len(m.weight) == 97]
        assert bool(embeddings) != tied, "a tied embedding is held once"
        again = NativeDecoder(model)
        assert all(torch.equal(a, b) for a, b in zip(generate(native), generate(again)))


def test_does_not_change_the_cache_when_refusing():
    native = NativeDecoder(make("llama"))
    cache = new_cache(native)
    seq = cache.create()
    cache.append([seq], 4)
    cache.k_pages.fill_(3.0)
    with pytest.raises(ValueError, match=r"needs int64 \[1, 4\]"):
        native.hidden(tokens_of(3, 0)[None], foveate.CacheView(cache, [seq], 4))
    other = foveate.PagedKVCache(8, 16, num_kv_heads=4, head_dim=16, num_layers=3, dtype=torch.float32)
    seq2 = other.create()
    other.append([seq2], 4)
    with pytest.raises(ValueError, match="k_pages has size 4 in dimension 3, expected 2"):
        native.hidden(tokens_of(4, 0)[None], foveate.CacheView(other, [seq2], 4))
    long = foveate.PagedKVCache(64, 16, num_kv_heads=2, head_dim=16, num_layers=3, dtype=torch.float32)
    seq3 = long.create()
    long.append([seq3], 129)
    long.k_pages.fill_(3.0)
    with pytest.raises(ValueError, match="128 positions, sequence 0 needs 129"):
        native.hidden(torch.zeros(1, 129, dtype=torch.int64), foveate.CacheView(long, [seq3], 129))
    assert (long.k_pages == 3.0).all() and (cache.k_pages == 3.0).all()


def test_unsupported_models_get_a_sentence():
    with pytest.raises(ValueError, match=r"not Linear; call the model itself"):
        NativeDecoder(nn.Linear(3, 3))
    assert "float64" in NativeDecoder.unsupported(make("llama").double())
    assert "is on meta" in NativeDecoder.unsupported(make("llama").to("meta"))
    mixed = make("llama")
    mixed.model.layers[1].self_attn.k_proj = PackedLinear.from_linear(mixed.model.layers[1].self_attn.k_proj, "q8_0")
    assert "must share one kind of format" in NativeDecoder.unsupported(mixed)
    assert NativeDecoder.unsupported(make("gpt2")) is None
