"""What a model's backward pass computes again instead of keeping: fewer bytes, the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveate.models import recompute
from foveate.models.bert import BertConfig, BertForMaskedLM
from foveate.models.gpt2 import GPT2, GPT2Config
from foveate.models.llama import Llama, LlamaConfig
from foveate.models.t5 import T5, T5Config
from foveate.train.modules.gradient_checkpointing import checkpoint_layers

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 96, "num_layers": 2, "num_heads": 2}
HEADS = {"num_kv_heads": 2, "head_dim": 16, "max_positions": 64}


def llama(**options):
    return Llama(LlamaConfig(**SIZES, **HEADS, windows=(None, None), **options))


MODELS = {
    "llama": llama,
    "gemma2": lambda: llama(norm_offset=1.0, post_norms=True, activation="gelu_pytorch_tanh"),
    "gpt2": lambda: GPT2(GPT2Config(**SIZES, **HEADS, scales=(0.25, 0.25))),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, max_positions=64)),
    "t5": lambda: T5(T5Config(**SIZES, num_decoder_layers=2, head_dim=16)),
    "t5_gated": lambda: T5(T5Config(**SIZES, num_decoder_layers=2, head_dim=16, gated=True, activation="gelu_new")),
    "t5_dropout": lambda: T5(T5Config(**SIZES, num_decoder_layers=2, head_dim=16, dropout=0.2)),
}


def passes(model):
    """The loss, every gradient, and the bytes that a forward pass leaves allocated."""
    tokens = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        logits = model(tokens, tokens) if isinstance(model, T5) else model(tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(e.self_cpu_memory_usage for e in profile.key_averages())


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_from_less(name):
    torch.manual_seed(1)
    model = MODELS[name]().train()
    loss, gradients, size = passes(model)
    with recompute.kept():
        loss_kept, gradients_kept, size_kept = passes(model)
    assert torch.equal(loss, loss_kept) and gradients.keys() == gradients_kept.keys() and len(gradients) > 10
    for parameter, gradient in gradients.items():
        assert torch.equal(gradient, gradients_kept[parameter]), parameter
    assert 0 < size < (0.95 if name == "t5_dropout" else 0.85) * size_kept


def test_frozen_weights_and_frozen_inputs():
    """As under LoRA: the norms and the first layers have no gradient."""
    model = llama()
    for name, p in model.named_parameters():
        p.requires_grad = "down_proj" in name
    _, gradients, _ = passes(model)
    with recompute.kept():
        _, expected, _ = passes(model)
    assert len(gradients) == 2 and all(torch.equal(gradients[n], expected[n]) for n in expected)


def test_within_checkpointed_layers():
    torch.manual_seed(1)
    model = llama()
    _, expected, _ = passes(model)
    checkpoint_layers(model)
    _, gradients, _ = passes(model)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_a_graph_that_is_kept_gives_the_same_again():
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)
    y = recompute.feed(lambda t: F.linear(t, weight), F.silu, x).sum()
    first = torch.autograd.grad(y, (x, weight), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y, (x, weight))))


def test_second_derivatives_are_refused():
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)
    y = recompute.feed(lambda t: F.linear(t, weight) ** 2, F.silu, x).sum()
    first = torch.autograd.grad(y, (x, weight), create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(first[0].sum() + first[1].sum(), x)


def test_torch_func_takes_the_plain_way():
    weight = torch.randn(8, 8)
    x = torch.randn(4, 8)
    found = torch.func.grad(lambda x: recompute.feed(lambda t: F.linear(t, weight), F.silu, x).sum())(x)
    assert torch.allclose(found, torch.func.grad(lambda x: F.linear(F.silu(x), weight).sum())(x))
