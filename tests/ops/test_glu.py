"""swiglu and geglu: values and gradients against torch, strides, extreme inputs, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.ops.layout import matrix
from op_compare import compare_op

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in foveate.backends().items()
]


def torchs(name, approximate="tanh"):
    if name == "swiglu":
        return lambda gate, up: F.silu(gate) * up
    return lambda gate, up: F.gelu(gate, approximate=approximate) * up


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (4, 1025), (1,)], ids=str)
def test_values_and_gradients(shape, dtype, name, backend):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton takes no float64")
    function = getattr(foveate, name)
    gate, up = (torch.randn(shape) * 3).to(dtype), torch.randn(shape).to(dtype)
    compare_op(lambda g, u: function(g, u, backend=backend), torchs(name), gate, up)


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_gates(name, dtype):
    """No overflow inside: the gradient is finite, the value 0 or gate * up."""
    largest = min(torch.finfo(dtype).max, 1e30)
    gate = torch.tensor([-largest, -1000.0, -88.5, -20.0, -0.0, 0.0, 20.0, 88.5, 1000.0, largest], dtype=dtype)
    up = torch.full_like(gate, 0.5)
    leaf = gate.clone().requires_grad_()
    out = getattr(foveate, name)(leaf, up)
    out.backward(torch.ones_like(out))
    exact = gate.double().requires_grad_()
    # torch's tanh form overflows in the cube of large gates, where the slope of GELU is 1 or 0
    want = torchs(name)(exact.clamp(-1e4, 1e4) if name == "geglu" else exact, up.double())
    eps = torch.finfo(dtype).eps
    small = gate.abs() <= 1e4
    torch.testing.assert_close(out[small].double(), want.detach()[small], rtol=4 * eps, atol=1e-7)
    torch.testing.assert_close(out[~small].double(), gate[~small].clamp(min=0).double() / 2, rtol=4 * eps, atol=0)
    slope = torch.where(gate > 100, 0.5, 0.0).double()
    far = gate.abs() > 100
    torch.testing.assert_close(leaf.grad[far].double(), slope[far], rtol=4 * eps, atol=0)
    assert leaf.grad.isfinite().all()


def test_nan_stays_visible():
    x = torch.tensor([float("nan"), 1.0])
    assert foveate.swiglu(x, torch.ones(2)).isnan().tolist() == [True, False]
    assert foveate.geglu(x, torch.ones(2)).isnan().tolist() == [True, False]


def test_halves_of_one_tensor_are_not_copied():
    x = torch.randn(4, 5, 26)
    gate, up = x.chunk(2, -1)
    assert matrix(gate).data_ptr() == x.data_ptr()
    torch.testing.assert_close(foveate.swiglu(gate, up), F.silu(gate) * up)
    permuted = torch.randn(7, 5, 3).permute(2, 1, 0)
    torch.testing.assert_close(foveate.geglu(permuted, permuted), F.gelu(permuted, approximate="tanh") * permuted)


def test_the_error_function_is_the_reference_backends():
    gate, up = torch.randn(3, 9), torch.randn(3, 9)
    compare_op(lambda g, u: foveate.geglu(g, u, approximate="none"), torchs("geglu", "none"), gate, up)
    with pytest.raises(foveate.UnsupportedError, match="backends that can: reference"):
        foveate.geglu(gate, up, approximate="none", backend="native")


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), ()], ids=str)
def test_empty_and_scalar(shape):
    gate, up = torch.randn(shape, requires_grad=True), torch.randn(shape)
    out = foveate.swiglu(gate, up)
    assert out.shape == gate.shape
    out.sum().backward()
    assert gate.grad.shape == gate.shape


def test_vmap_and_compile():
    gate, up = torch.randn(3, 4, 8), torch.randn(4, 8)
    torch.testing.assert_close(
        torch.vmap(foveate.swiglu, (0, None))(gate, up), foveate.swiglu(gate, up.expand(3, 4, 8))
    )
    compiled = torch.compile(foveate.swiglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gate, gate), foveate.swiglu(gate, gate))


def test_opcheck():
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    torch.library.opcheck(torch.ops.foveate.glu.default, (gate, up, True))
    torch.library.opcheck(torch.ops.foveate.glu_backward.default, (gate, gate, up, False))


def test_bad_input():
    x = torch.randn(2, 4)
    for call, words in (
        (lambda: foveate.swiglu(x, x[:1]), "gate has shape .* up .* equal"),
        (lambda: foveate.swiglu(x, x.half()), "up is torch.float16 .* gate"),
        (lambda: foveate.swiglu(x, None), "up must be a torch.Tensor"),
        (lambda: foveate.geglu(x, x, approximate="erf"), "approximate='erf'"),
        (lambda: foveate.geglu(x, x, backend=1), "backend=1"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()
