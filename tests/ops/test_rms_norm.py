"""rms_norm: values and gradients against torch in the same dtype, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.backend.reference import rows as reference_rows
from foveate.ops.rms_norm import _dweight_parts
from op_compare import compare_op
from poison import guarded_outputs, nan_padded

pytestmark = [pytest.mark.kernels, pytest.mark.cuda]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 7, 63, 65, 576, 1000, 50257])
def test_values_and_gradients(cols, dtype):
    x, weight = (torch.randn(max(3, min(33, 100_000 // cols)), cols) * 3).to(dtype), torch.randn(cols).to(dtype)
    compare_op(lambda x, w: foveate.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (cols,), w, 1e-5), x, weight)
    compare_op(lambda x: foveate.rms_norm(x, None, 1e-5), lambda x: F.rms_norm(x, (cols,), None, 1e-5), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weight(dtype):
    x, weight = torch.randn(9, 65).to(dtype).requires_grad_(), torch.randn(65, requires_grad=True)
    out = foveate.rms_norm(x, weight, 1e-5)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    F.rms_norm(wide[0], (65,), wide[1], 1e-5).square().sum().backward()
    assert weight.grad.dtype == torch.float32
    # The upstream gradient is 2 * out, rounded to dtype.
    torch.testing.assert_close(weight.grad.double(), wide[1].grad, rtol=2e-2, atol=5e-2)


def test_dweight_of_many_rows():
    x, weight = torch.randn(5000, 33), torch.randn(33)
    compare_op(lambda x, w: foveate.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (33,), w, 1e-5), x, weight)


def test_dweight_parts():
    assert _dweight_parts(1, 0) == _dweight_parts(1, 132) == 1
    assert _dweight_parts(10**6, 0) == 256 and _dweight_parts(10**6, 132) == 264
    assert _dweight_parts(640, 0) == 10 and _dweight_parts(640, 132) == 40


def test_strides_and_shapes():
    weight = torch.randn(12)
    x = torch.randn(5, 24, 6, 3)
    for strided in (
        x.transpose(1, 3)[..., ::2],
        x.movedim(1, -1)[..., :12],
        torch.randn(1, 12).expand(7, 12),
        torch.randn(12),
    ):
        packed = strided.contiguous()
        assert torch.equal(foveate.rms_norm(strided, weight, 1e-6), foveate.rms_norm(packed, weight, 1e-6))
    turned = torch.stack([weight, weight], 1)[:, 0]
    assert turned.stride(0) == 2
    assert torch.equal(foveate.rms_norm(packed, turned, 1e-6), foveate.rms_norm(packed, weight, 1e-6))


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_zeros_and_big_values(backend):
    assert foveate.rms_norm(torch.zeros(2, 9), None, 1e-6, backend=backend).eq(0).all()
    big = torch.full((1, 9), 1e15)
    torch.testing.assert_close(foveate.rms_norm(big, None, 1e-6, backend=backend), torch.ones(1, 9))


def test_every_element_is_written():
    x, weight = torch.randn(7, 65), torch.randn(65, requires_grad=True)
    with guarded_outputs() as guard:
        leaf = nan_padded(x).requires_grad_()
        out = foveate.rms_norm(leaf, weight, 1e-5)
        out.sum().backward()
    guard.check()
    assert out.isfinite().all() and leaf.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty(shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], requires_grad=True)
    foveate.rms_norm(x, weight, 1e-5).sum().backward()
    assert x.grad.shape == x.shape and weight.grad.eq(0).all()


def test_gradcheck():
    x, weight = (
        torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(7, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, w: foveate.rms_norm(x, w, 1e-2), (x, weight))


def test_compile_vmap_and_func_grad():
    x, weight = torch.randn(4, 3, 7), torch.randn(4, 7)

    def loss(x, weight):
        return foveate.rms_norm(x, weight, 1e-5).pow(3).sum()

    leaves = x.clone().requires_grad_(), weight[0].clone().requires_grad_()
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))
    for in_dims, args in (((0, None), (x, weight[0])), ((0, 0), (x, weight)), ((None, 0), (x[0], weight))):
        grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=in_dims)(*args)
        for i in range(4):
            one = [t[i] if d == 0 else t for t, d in zip(args, in_dims)]
            for mapped, single in zip(grads, torch.func.grad(loss, argnums=(0, 1))(*one)):
                torch.testing.assert_close(mapped[i], single)


def test_opcheck():
    x, weight = torch.randn(2, 3, 7), torch.randn(7)
    ops = torch.ops.foveate
    out, rstd = ops.rms_norm.default(x, weight, 1e-5)
    torch.library.opcheck(ops.rms_norm.default, (x.transpose(0, 1), weight, 1e-5))
    torch.library.opcheck(ops.rms_norm_backward.default, (out, x, weight, rstd, None, True))
    torch.library.opcheck(ops.rms_norm_backward.default, (out, x, None, rstd, out, False))


def test_reference_is_the_definition():
    x, weight = torch.randn(3, 7), torch.randn(7)
    assert torch.equal(
        foveate.rms_norm(x, weight, 1e-5, backend="reference"), reference_rows.rms_norm(x, weight, 1e-5)[0]
    )


X, W = torch.zeros(2, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: foveate.rms_norm(X.sum(), None, 1e-5), ValueError, "x has no dimensions"),
        (lambda: foveate.rms_norm(X.int(), None, 1e-5), TypeError, "x is torch.int32"),
        (
            lambda: foveate.rms_norm(X, W[:2], 1e-5),
            ValueError,
            r"weight has shape \(2,\); x of shape \(2, 3\) needs \(3,\)",
        ),
        (lambda: foveate.rms_norm(X, W.half(), 1e-5), TypeError, "weight is torch.float16 and x is torch.float32"),
        (lambda: foveate.rms_norm(X, W.to("meta"), 1e-5), ValueError, "weight is on meta and x on cpu"),
        (lambda: foveate.rms_norm(X, W, -1e-5), ValueError, "eps=-1e-05 must not be negative"),
        (lambda: foveate.rms_norm(X, W, float("nan")), ValueError, "eps=nan must be a finite number"),
        (
            lambda: foveate.rms_norm(X, W, 1e-5, backend="triton"),
            foveate.UnsupportedError,
            "'triton' cannot serve rms_norm",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
