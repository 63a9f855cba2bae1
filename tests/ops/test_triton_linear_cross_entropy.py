"""linear_cross_entropy on the Triton kernels: the tests of the native backend that say most, and what differs there.

On the CPU they run under the interpreter: TRITON_INTERPRET=1 must be set when Python starts.
"""

from __future__ import annotations

import pytest
import torch
from test_linear_cross_entropy import REDUCTIONS, make, torch_loss

import foveate
from foveate.ops.cross_entropy import linear
from op_compare import compare_op

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]

if foveate.backends()["triton"] is not None:
    pytest.skip(f"triton: {foveate.backends()['triton']}", allow_module_level=True)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _on_the_device(device):
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def many_chunks(monkeypatch):
    for name in ("_CHUNK_BYTES", "_GPU_CHUNK_BYTES"):
        monkeypatch.setattr(linear, name, 1)
    monkeypatch.setattr(linear, "_MIN_CHUNK_TOKENS", 8)
    assert len(list(linear._chunks(torch.arange(21), 21, 4, -100, "triton"))) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_and_gradients(reduction, dtype, many_chunks):
    hidden, weight, bias, target = make(21, 40, 1003, dtype)
    compare_op(
        lambda h, w, b: foveate.linear_cross_entropy(h, w, target, bias=b, reduction=reduction, backend="triton"),
        lambda h, w, b: torch_loss(h, w, b, target, reduction=reduction),
        hidden,
        weight,
        bias,
        same_dtype=False,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options", [{"z_loss": 1e-2}, {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 8.0}], ids=str
)
def test_options_in_one_chunk(options, reduction):
    hidden, weight, _, target = make(21, 16, 65)
    compare_op(
        lambda h, w: foveate.linear_cross_entropy(h, w, target, reduction=reduction, backend="triton", **options),
        lambda h, w: torch_loss(h, w, None, target, reduction=reduction, **options),
        hidden,
        weight,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_may_be_nan(reduction, many_chunks):
    hidden, weight, bias, target = make(21, 8, 17)
    used = target != -100
    hidden[~used] = float("nan")
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = foveate.linear_cross_entropy(*leaves[:2], target, bias=bias, reduction=reduction, backend="triton")
    loss.sum().backward()
    expected = [hidden.detach()[used], weight.detach().clone(), bias.detach().clone()]
    expected = [t.requires_grad_() for t in expected]
    torch_loss(*expected, target[used], reduction=reduction).sum().backward()
    torch.testing.assert_close(hidden.grad[used], expected[0].grad)
    torch.testing.assert_close(weight.grad, expected[1].grad)
    torch.testing.assert_close(bias.grad, expected[2].grad)
    assert hidden.grad[~used].eq(0).all()


def test_without_gradients_and_with_some(many_chunks):
    hidden, weight, bias, target = make(21, 8, 17)
    plain = foveate.linear_cross_entropy(hidden, weight, target, bias=bias, backend="triton")
    torch.testing.assert_close(plain, torch_loss(hidden, weight, bias, target))
    bias.requires_grad_()
    foveate.linear_cross_entropy(hidden, weight, target, bias=bias, backend="triton").backward()
    assert hidden.grad is None and bias.grad is not None


def test_empty():
    hidden, weight, _, target = make(0, 8, 17)
    hidden.requires_grad_()
    loss = foveate.linear_cross_entropy(hidden, weight, target, reduction="sum", backend="triton")
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 8)


def test_a_target_outside_is_named_on_the_cpu(device, many_chunks):
    if device != "cpu":
        pytest.skip("checking it on a GPU would wait for the device")
    hidden, weight, _, target = make(21, 8, 17)
    target[19] = 17
    with pytest.raises(ValueError, match=r"target\[19\] = 17 is outside 0..16"):
        foveate.linear_cross_entropy(hidden, weight, target, backend="triton")
