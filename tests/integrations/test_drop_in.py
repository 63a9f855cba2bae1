"""foveate.drop_in.sdpa: unmodified torch code runs on foveate while it is active, and on torch again afterwards."""

from __future__ import annotations

import pickle
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

from foveate import drop_in

TORCH_SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _torch_is_restored():
    yield
    assert F.scaled_dot_product_attention is TORCH_SDPA
    assert imported_by_name is TORCH_SDPA
    assert torch.backends.mha.get_fastpath_enabled()


def qkv():
    return [torch.randn(2, 4, 9, 16) for _ in range(3)]


def test_with_block():
    expected = F.scaled_dot_product_attention(*qkv_fixed, is_causal=True)
    with drop_in.sdpa():
        found = F.scaled_dot_product_attention(*qkv_fixed, is_causal=True)
        assert drop_in.calls() == 1
        imported_by_name(*qkv_fixed)
        torch._C._nn.scaled_dot_product_attention(*qkv_fixed)
        assert drop_in.calls() == 3
    torch.testing.assert_close(found, expected)
    F.scaled_dot_product_attention(*qkv_fixed)
    assert drop_in.calls() == 3


qkv_fixed = qkv()


def test_decorator_nesting_and_exceptions():
    @drop_in.sdpa()
    def attend():
        with drop_in.sdpa():
            F.scaled_dot_product_attention(*qkv_fixed)
        F.scaled_dot_product_attention(*qkv_fixed)
        return drop_in.calls()

    assert attend() == 2
    assert attend() == 2  # counted from the start of each use
    with pytest.raises(KeyError), drop_in.sdpa():
        raise KeyError


def test_enable_and_disable():
    handle = drop_in.sdpa().enable()
    try:
        drop_in.sdpa().enable()
        with drop_in.sdpa():
            pass
        F.scaled_dot_product_attention(*qkv_fixed)
        assert drop_in.calls() == 1
    finally:
        handle.disable()
    assert F.scaled_dot_product_attention is TORCH_SDPA
    drop_in.sdpa().disable()  # again changes nothing


def test_other_threads_are_reached():
    with drop_in.sdpa():
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=qkv_fixed)
        thread.start()
        thread.join()
        assert drop_in.calls() == 1


def test_what_foveate_cannot_serve_raises():
    numbers = torch.ones(1, 2, 3, 16, dtype=torch.int32)
    with drop_in.sdpa(), pytest.raises(ValueError, match=r"query, key and value have dtype torch\.int32"):
        F.scaled_dot_product_attention(numbers, numbers, numbers)


@pytest.mark.parametrize("dims", [(257, 257), (512, 512), (64, 320), (576, 512), (640, 640)], ids=str)
def test_any_head_dim_is_served(dims):
    q, k, v = torch.randn(1, 2, 20, dims[0]), torch.randn(1, 2, 33, dims[0]), torch.randn(1, 2, 33, dims[1])
    expected = F.scaled_dot_product_attention(q, k, v)
    with drop_in.sdpa():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v), expected, rtol=1e-5, atol=1e-5)


def encoder(batch_first=True):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
    return torch.nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage"
)  # of torch's own fast path
def test_transformer_encoder(training, masked):
    """In eval mode without gradients torch would take its fast path, which never calls F.scaled_dot_product_attention."""
    model, x = encoder().train(training), torch.randn(2, 9, 32)
    options = {"src_key_padding_mask": torch.tensor([[False] * 6 + [True] * 3, [False] * 9])} if masked else {}
    with torch.set_grad_enabled(training):
        expected = model(x, **options)
        with drop_in.sdpa():
            found = model(x, **options)
            assert drop_in.calls() == 2
    kept = torch.ones(2, 9, dtype=torch.bool) if not masked else ~options["src_key_padding_mask"]
    torch.testing.assert_close(found[kept], expected[kept])
    if training:
        grads = [torch.autograd.grad(y[kept].square().sum(), list(model.parameters())) for y in (found, expected)]
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_multihead_attention():
    model, x = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval(), torch.randn(2, 9, 32)
    with torch.no_grad():
        expected, _ = model(x, x, x, need_weights=False)
        with drop_in.sdpa():
            found, _ = model(x, x, x, need_weights=False)
            assert drop_in.calls() == 1
    torch.testing.assert_close(found, expected)


def test_compiled_before_and_compiled_inside():
    """A graph that was compiled on torch's function is compiled anew when the drop-in becomes active, and goes back after."""
    torch.compiler.reset()
    model, x = encoder().eval(), torch.randn(2, 9, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = compiled(x)
        with drop_in.sdpa():
            found = compiled(x)
            assert drop_in.calls() == 2
        torch.testing.assert_close(found, expected)
        compiled(x)
        assert drop_in.calls() == 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, under dynamo
def test_compiled_training_step():
    torch.compiler.reset()
    model, x = encoder().train(), torch.randn(2, 9, 32)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with drop_in.sdpa():
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        found = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        assert drop_in.calls() == 2
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Block(torch.nn.Module):
    def forward(self, x):
        q, k, v = x.chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_symbolic_trace():
    """A graph that was traced inside holds foveate's function, also after the block and a trip through pickle."""
    x = torch.randn(2, 2, 5, 48)
    expected = Block()(x)
    with drop_in.sdpa():
        traced = torch.fx.symbolic_trace(Block())
    before = drop_in.calls()
    torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-6)
    again = pickle.loads(pickle.dumps(traced))
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-6)
    assert drop_in.calls() == before + 2


def test_subclasses_and_modes_see_the_call():
    class Seen(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    q, k, v = qkv()
    expected = F.scaled_dot_product_attention(q, k, v)
    names = []
    with drop_in.sdpa():
        out = F.scaled_dot_product_attention(q.as_subclass(Seen), k, value=v)
        assert drop_in.calls() == 1
        assert names == ["scaled_dot_product_attention"] and type(out) is Seen
        torch.testing.assert_close(out.as_subclass(torch.Tensor), expected, rtol=1e-5, atol=1e-6)
        names.clear()
        with Mode():
            F.scaled_dot_product_attention(q, k, v)
        assert names[0] == "scaled_dot_product_attention"


def test_diffusers_backends(monkeypatch):
    """enable() is the drop-in, and says so where diffusers' backend would pass it by. A module stands for diffusers'."""
    from foveate.integrations import diffusers

    backend = SimpleNamespace(value="native")
    registry = SimpleNamespace(get_active_backend=lambda: (backend, None))
    monkeypatch.setitem(
        sys.modules, "diffusers.models.attention_dispatch", SimpleNamespace(_AttentionBackendRegistry=registry)
    )
    q, k, v = qkv()
    diffusers.enable()
    F.scaled_dot_product_attention(q, k, v)
    assert drop_in.calls() == 1
    diffusers.disable()
    backend.value = "flash"
    with pytest.raises(RuntimeError, match=r"diffusers' attention backend is 'flash'"):
        diffusers.enable()
