"""Matrix products of training on a CPU: right, for every layout, and through oneDNN where it says so."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveate.ops import onednn_linear
from foveate.train.modules.linear import TrainedLinear, speed_up_linear

needs_onednn = pytest.mark.skipif(
    onednn_linear._onednn() is None, reason="this torch has no oneDNN op for linear layers here"
)


def error(found, exact, theirs):
    """Of the sum of a few hundred products: not above twice torch's own, with a floor of fp32's rounding."""
    return float((found.double() - exact).abs().max()) <= 2 * float((theirs.double() - exact).abs().max()) + 1e-5


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 130, 170, 90), (1, 257, 96, 384)])
def test_forward_and_backward(shape, bias, monkeypatch):
    B, S, inner, out = shape
    calls = []
    op = onednn_linear._onednn()
    monkeypatch.setattr(onednn_linear, "_onednn", lambda: lambda *args: calls.append(1) or op(*args))
    x, weight, b = torch.randn(B, S, inner), torch.randn(out, inner), torch.randn(out) if bias else None
    dout = torch.randn(B, S, out)
    results = []
    for function, dtype in (
        (onednn_linear.linear, torch.float32),
        (F.linear, torch.float64),
        (F.linear, torch.float32),
    ):
        inputs = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in (x, weight, b)]
        y = function(*inputs)
        y.backward(dout.to(dtype))
        results.append([y.detach(), *(t.grad for t in inputs if t is not None)])
    assert len(calls) == 3
    for found, exact, theirs in zip(*results):
        assert found.shape == exact.shape and error(found, exact, theirs)


@needs_onednn
def test_only_the_gradients_that_are_needed(monkeypatch):
    calls = []
    op = onednn_linear._onednn()
    monkeypatch.setattr(onednn_linear, "_onednn", lambda: lambda *args: calls.append(1) or op(*args))
    x, weight = torch.randn(200, 128, requires_grad=True), torch.randn(128, 128)
    onednn_linear.linear(x, weight).sum().backward()
    assert len(calls) == 2 and torch.allclose(x.grad, weight.sum(0).expand(200, -1), atol=1e-3)


def test_small_products_and_other_dtypes_are_torchs_own():
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    assert torch.equal(onednn_linear.linear(x, weight), F.linear(x, weight))
    x, weight = torch.randn(300, 128, dtype=torch.float64), torch.randn(128, 128, dtype=torch.float64)
    assert torch.equal(onednn_linear.product(x, weight), F.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        x, weight = torch.randn(300, 128), torch.randn(128, 128)
        assert torch.equal(onednn_linear.linear(x, weight), F.linear(x, weight))


def test_a_model_keeps_its_names():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Embedding(3, 4))
    before = model.state_dict()
    speed_up_linear(model)
    assert type(model[0]) is TrainedLinear and isinstance(model[0], torch.nn.Linear)
    assert model.state_dict().keys() == before.keys() and model[0].weight is not None
