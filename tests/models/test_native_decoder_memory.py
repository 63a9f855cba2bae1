"""The addresses that the native decoder and a CUDA graph keep: what moves or changes the weights is seen at the next step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_native_decoder import make

import foveate
from foveate.generation.engine import Engine
from foveate.models.addresses import Addresses
from foveate.models.native_decoder import NativeDecoder


def step(decoder: NativeDecoder, tokens=(3, 5, 7)) -> torch.Tensor:
    c = decoder.config
    cache = foveate.PagedKVCache(
        16, 4, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, num_layers=c.num_layers, dtype=torch.float32
    )
    seq = cache.create()
    cache.append([seq], len(tokens))
    return decoder(torch.tensor([tokens]), foveate.CacheView(cache, [seq], len(tokens)))


def fresh(model) -> torch.Tensor:
    """What a decoder that is built now computes."""
    return step(NativeDecoder(copy.deepcopy(model)))


def scaled(model):
    return {name: t * 0.5 if t.is_floating_point() else t.clone() for name, t in model.state_dict().items()}


CHANGES = {
    "share_memory": lambda model: model.share_memory(),
    "load_state_dict": lambda model: model.load_state_dict(scaled(model)),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(scaled(model), assign=True),
    "to": lambda model: model.to(torch.bfloat16),
    "set_submodule": lambda model: model.set_submodule(
        "model.norm" if hasattr(model, "model") else "transformer.ln_f",
        copy.deepcopy(model.model.norm if hasattr(model, "model") else model.transformer.ln_f),
    ),
    "new storage": lambda model: [
        p.set_(p.clone()) for p in [*model.parameters(), *(b for b in model.buffers() if b.numel())]
    ],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_moved_and_changed_weights_are_the_ones_that_run(name, change):
    decoder = NativeDecoder(make(name))
    step(decoder)
    with torch.no_grad():
        CHANGES[change](decoder.model)
    junk = [torch.full((300, 300), 7.0) for _ in range(50)]  # takes the place of what has been freed
    assert torch.equal(step(decoder), fresh(decoder.model))
    assert len(junk) == 50


def test_norms_that_were_converted_follow_too():
    decoder = NativeDecoder(make("gemma2").to(torch.bfloat16))
    before = step(decoder)
    with torch.no_grad():
        decoder.model.model.norm.weight.add_(1.0)
    after = step(decoder)
    assert not torch.equal(after, before) and torch.equal(after, fresh(decoder.model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_copies_and_pickles_have_their_own_memory(name):
    decoder = NativeDecoder(make(name))
    expected = step(decoder)
    copied, pickled = copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))
    with torch.no_grad():
        for tensor in [*decoder.model.parameters(), *(b for b in decoder.model.buffers() if b.numel())]:
            tensor.zero_()
    del decoder
    assert torch.equal(step(copied), expected) and torch.equal(step(pickled), expected)


def test_what_cannot_run_any_more_is_a_sentence():
    decoder = NativeDecoder(make("llama"))
    decoder.model.model.layers[1].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="NativeDecoder runs packed linear layers, not a Identity"):
        step(decoder)
    decoder.model.model.layers[1].mlp.up_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="gate_proj and up_proj of model.layers.1.mlp are Identity and fp32"):
        step(decoder)


def test_addresses_see_nothing_where_nothing_changed():
    model = make("qwen3")
    addresses = Addresses(model)
    model(torch.tensor([[1, 2]]))
    assert not addresses.changed()
    model.model.layers[0].mlp.up_proj.register_buffer("more", torch.zeros(1))
    assert not addresses.changed()  # nobody has its address
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert addresses.changed()


def test_sequences_beyond_the_first_rotary_table():
    """4096 positions are computed at first; then those that the cache has room for."""
    model = make("llama")
    object.__setattr__(model.config, "max_positions", 10_000)
    model.rotary.max_positions = 10_000
    decoder = NativeDecoder(model)
    c = model.config
    cache = foveate.PagedKVCache(
        1300, 4, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, num_layers=c.num_layers, dtype=torch.float32
    )
    tokens = torch.arange(5000) % 97
    seq = cache.create()
    for part in tokens.split(1000):
        cache.append([seq], len(part))
        found = decoder.hidden(part[None], foveate.CacheView(cache, [seq], len(part)))
    expected = model.hidden(tokens[None])[:, -1000:]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_an_engine_looks_at_weights_when_a_request_comes(monkeypatch):
    """Or before each step, unless who drives it says that nothing can change them in between."""
    decoder, looks = NativeDecoder(make("llama")), []
    changed = Addresses.changed
    monkeypatch.setattr(Addresses, "changed", lambda self: looks.append(self) or changed(self))
    c = decoder.config
    shape = dict(num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, num_layers=c.num_layers, dtype=torch.float32)
    engine = Engine(decoder, foveate.PagedKVCache(64, 4, **shape), enable_prefix_caching=False)

    def generated(name: str) -> list[int]:
        engine.add(name, [3, 5, 7], foveate.SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
        looks.clear()
        outputs = []
        while engine.has_work:
            outputs = engine.step()
        return outputs[0].outputs[0].token_ids

    before = generated("each")
    assert len(looks) == 5
    engine.weights_fixed = True
    assert generated("fixed") == before and len(looks) == 1
    decoder.model.load_state_dict(scaled(decoder.model), assign=True)
    expected = int(fresh(decoder.model)[0, -1].argmax())
    assert generated("changed")[0] == expected and len(looks) == 1
    step(decoder)
    assert len(looks) == 2  # without the engine it looks as before
