"""rms_norm over several dimensions, with an offset, with the residual add: against torch in the same dtype and fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import foveate
from op_compare import compare_op
from poison import guarded_outputs, nan_padded

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
def test_several_dimensions(shape, dtype):
    x, weight = torch.randn(4, 2, 3, 5).to(dtype), torch.randn(shape).to(dtype)
    compare_op(
        lambda x, w: foveate.rms_norm(x, w, 1e-5, normalized_shape=shape),
        lambda x, w: F.rms_norm(x, shape, w, 1e-5),
        x,
        weight,
    )
    assert torch.equal(foveate.rms_norm(x, None, 1e-5, normalized_shape=5), foveate.rms_norm(x, None, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gemmas_offset(dtype):
    """1 + w in the compute dtype: bf16 would lose the small weights."""
    x, weight = torch.randn(6, 33).to(dtype), (torch.randn(33) * 1e-3).to(dtype)
    compare_op(
        lambda x, w: foveate.rms_norm(x, w, 1e-6, offset=1.0), lambda x, w: F.rms_norm(x, (33,), 1 + w, 1e-6), x, weight
    )
    exact = F.rms_norm(x.double(), (33,), 1 + weight.double(), 1e-6)
    torch.testing.assert_close(
        foveate.rms_norm(x, weight, 1e-6, offset=1).double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0
    )
    leaf = weight.clone().requires_grad_()
    foveate.rms_norm(x, leaf, 1e-6, offset=1.0).sum().backward()
    assert leaf.grad.dtype == dtype


@pytest.mark.kernels
@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("used", ["both", "out", "sum"])
@pytest.mark.parametrize("cols", [1, 16, 577, 9000])
def test_with_the_residual_add(cols, used, dtype):
    """One kernel, whose rows fit its registers or not."""
    x, residual, weight = (torch.randn(s).to(dtype) for s in ((2, 3, cols), (2, 3, cols), (cols,)))

    def join(out, h):
        return {"both": out * 2 + h, "out": out, "sum": h + 0 * out}[used]

    def ours(x, r, w):
        return join(*foveate.rms_norm(x, w, 1e-5, residual=r, offset=1.0))

    def peer(x, r, w):
        h = x + r
        return join(F.rms_norm(h, (cols,), 1 + w, 1e-5), h)

    compare_op(ours, peer, x, residual, weight)
    out, h = foveate.rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(out, foveate.rms_norm(h, weight, 1e-5))


@pytest.mark.kernels
@pytest.mark.cuda
def test_residual_memory():
    """Strided rows, NaN beside them, and every element of the results written."""
    x, residual, weight = torch.randn(7, 65), torch.randn(7, 65), torch.randn(65, requires_grad=True)
    with guarded_outputs() as guard:
        leaves = [nan_padded(t).requires_grad_() for t in (x, residual)]
        out, h = foveate.rms_norm(leaves[0], weight, 1e-5, residual=leaves[1])
        (out + h).sum().backward()
    guard.check()
    assert torch.equal(h, x + residual) and torch.equal(out, foveate.rms_norm(x + residual, weight, 1e-5))
    assert torch.equal(leaves[0].grad, leaves[1].grad) and leaves[0].grad.isfinite().all()


def test_residual_of_torchs_tools():
    """opcheck, compile, and vmap over each operand; test_derivatives.py has the derivatives."""
    x, residual, weight = torch.randn(4, 3, 7), torch.randn(4, 3, 7), torch.randn(4, 7)
    ops = torch.ops.foveate
    torch.library.opcheck(ops.add_rms_norm.default, (x.transpose(0, 1), residual.transpose(0, 1), weight[0], 1e-5))

    def loss(x, residual, weight):
        out, h = foveate.rms_norm(x, weight, 1e-5, residual=residual)
        return out.pow(3).sum() + h.pow(2).sum()

    leaves = [t.clone().requires_grad_() for t in (x, residual, weight[0])]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))
    for in_dims, args in (
        ((0, 0, None), (x, residual, weight[0])),
        ((0, None, 0), (x, residual[0], weight)),
        ((None, 0, None), (x[0], residual, weight[0])),
    ):
        grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=in_dims)(*args)
        for i in range(4):
            one = [t[i] if d == 0 else t for t, d in zip(args, in_dims)]
            for mapped, single in zip(grads, torch.func.grad(loss, argnums=(0, 1, 2))(*one)):
                torch.testing.assert_close(mapped[i], single)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_residual_of_nothing(shape):
    x = torch.randn(shape, requires_grad=True)
    out, h = foveate.rms_norm(x, None, 1e-5, residual=x)
    (out + h).sum().backward()
    assert out.shape == h.shape == x.grad.shape == shape


def test_residual_over_several_dimensions():
    x, residual, weight = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.randn(3, 5)
    out, h = foveate.rms_norm(x, weight, 1e-5, normalized_shape=(3, 5), residual=residual)
    assert torch.equal(h, x + residual)
    torch.testing.assert_close(out, F.rms_norm(h, (3, 5), weight, 1e-5))


def test_bad_input():
    x, w = torch.randn(2, 3, 5), torch.randn(5)
    for call, words in (
        (lambda: foveate.rms_norm(x, w, 1e-5, normalized_shape=(3, 5)), r"weight has shape \(5,\)"),
        (lambda: foveate.rms_norm(x, None, 1e-5, normalized_shape=(2, 5)), "normalized_shape=.* last dimensions"),
        (lambda: foveate.rms_norm(x, None, 1e-5, normalized_shape=()), "normalized_shape="),
        (lambda: foveate.rms_norm(x, None, 1e-5, normalized_shape=5.0), "normalized_shape="),
        (lambda: foveate.rms_norm(x, w, 1e-5, offset="1"), "offset='1'"),
        (lambda: foveate.rms_norm(x, None, 1e-5, offset=0.5), "offset=0.5 without a weight"),
        (lambda: foveate.rms_norm(x, w, 1e-5, residual=x[:1]), "residual has shape"),
        (lambda: foveate.rms_norm(x, w, 1e-5, residual=x.half()), "residual is torch.float16"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()
