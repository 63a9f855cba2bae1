"""rms_norm over several dimensions, with an offset, with the residual add: against torch in the same dtype and fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import foveate
from op_compare import compare_op

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("used", ["both", "out", "sum"])
def test_with_the_residual_add(used, dtype):
    x, residual, weight = (torch.randn(s).to(dtype) for s in ((2, 3, 16), (2, 3, 16), (16,)))

    def join(out, h):
        return {"both": out * 2 + h, "out": out, "sum": h + 0 * out}[used]

    def ours(x, r, w):
        return join(*foveate.rms_norm(x, w, 1e-5, residual=r, offset=1.0))

    def peer(x, r, w):
        h = x + r
        return join(F.rms_norm(h, (16,), 1 + w, 1e-5), h)

    compare_op(ours, peer, x, residual, weight)
    out, h = foveate.rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(h, x + residual)
    assert torch.equal(out, foveate.rms_norm(h, weight, 1e-5))


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
