"""What a call without gradients does not do: the parts of the call overhead that can be counted rather than timed."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.backend import native, registry
from foveate.ops import softmax
from foveate.ops.attention import autograd, op, with_kv_cache_op


def plain_call(**options):
    q, k, v = (torch.randn(1, 1, 8, 64) for _ in range(3))
    return foveate.attention(q, k, v, **options)


@pytest.fixture
def long_ways(monkeypatch):
    """How often the autograd.Function was taken."""
    taken = []
    for owner, name in ((autograd.Attention, "apply"), (autograd, "_apply")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real: taken.append(1) or real(*args))
    return taken


def test_a_call_without_gradient_skips_autograd_and_dispatch(long_ways):
    plain_call(causal=True)
    with torch.no_grad():
        q = torch.randn(1, 1, 8, 64, requires_grad=True)
        foveate.attention(q, q, q)
    with torch.inference_mode():
        plain_call()
    assert long_ways == []
    q = torch.randn(1, 1, 8, 64, requires_grad=True)
    foveate.attention(q, q, q)
    assert long_ways == [1]


@pytest.mark.skipif(native.missing_reason is not None, reason="no compiled module")
def test_lse_is_not_allocated_unless_asked_for(monkeypatch):
    allocated = []
    real = op.empty_lse
    monkeypatch.setattr(op, "empty_lse", lambda *args: allocated.append(1) or real(*args))
    plain_call(backend="native")
    assert allocated == []
    plain_call(backend="native", return_lse=True)
    assert allocated == [1]


def test_the_choice_is_cached(monkeypatch):
    plain_call()
    asked = []
    registry.forget_choices()
    monkeypatch.setattr(registry, "why_not", lambda *call, real=registry.why_not: asked.append(call) or real(*call))
    plain_call()
    assert asked
    asked.clear()
    plain_call()
    assert not asked
    registry.forget_choices()
    plain_call()
    assert asked


def test_python_allocates_nothing_but_the_output(monkeypatch):
    """No copies and casts of inputs that are as the kernel wants them: every torch function that the call may run is counted."""

    class Count(torch.overrides.TorchFunctionMode):
        functions = ()

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.functions += (getattr(func, "__name__", str(func)),)
            return func(*args, **(kwargs or {}))

    with Count() as count:
        plain_call(backend="native" if native.missing_reason is None else None)
    computing = {"empty", "empty_like", "clone", "contiguous", "to", "copy_", "new_empty", "randint"}
    if native.missing_reason is None:
        assert [name for name in count.functions if name in computing] == ["empty_like"]


def refuse(*args):
    raise AssertionError("the dispatcher was asked")


def test_other_ops_without_gradient_skip_dispatch_too(monkeypatch):
    """And take it where someone could see the difference: a gradient, or a dispatch mode."""
    x = torch.randn(2, 8)
    cache, lens = torch.randn(1, 4, 2, 8), torch.tensor([3], dtype=torch.int32)
    expected = foveate.softmax(x), foveate.attention_with_kv_cache(cache[:, :1], cache, cache, kv_lens=lens)
    monkeypatch.setattr(softmax, "_softmax", refuse)
    monkeypatch.setattr(with_kv_cache_op, "op", refuse)
    assert torch.equal(foveate.softmax(x), expected[0])
    assert torch.equal(foveate.attention_with_kv_cache(cache[:, :1], cache, cache, kv_lens=lens), expected[1])
    with torch.utils._python_dispatch.TorchDispatchMode(), pytest.raises(AssertionError, match="dispatcher"):
        foveate.softmax(x)
    with pytest.raises(AssertionError, match="dispatcher"):
        foveate.softmax(x.requires_grad_())
