"""softmax, log_softmax, rms_norm, apply_rotary and cross_entropy on the Triton kernels, forward and backward.

On the CPU they run under the interpreter: TRITON_INTERPRET=1 must be set when Python starts.
"""

from __future__ import annotations

import functools

import pytest
import torch

import foveate
from foveate.backend.reference import rows as reference_rows
from op_compare import compare_op

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]

if foveate.backends()["triton"] is not None:
    pytest.skip(f"triton: {foveate.backends()['triton']}", allow_module_level=True)


@pytest.fixture(autouse=True)
def _on_the_device(device):
    """Every tensor that a test makes is on the device under test."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 7, 64, 1000, 9000]  # the last needs two blocks


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(width, dtype):
    x = torch.randn(2, 3, width).to(dtype)
    compare_op(
        lambda x: foveate.softmax(x, scale=0.7, backend="triton"), lambda x: torch.softmax(0.7 * x.float().to(x), -1), x
    )
    compare_op(lambda x: foveate.log_softmax(x, backend="triton"), lambda x: torch.log_softmax(x, -1), x)


OPTIONS = ["mask", "causal", "column mask", "mask, causal and a negative scale"]


@pytest.mark.parametrize("what", OPTIONS)
@pytest.mark.parametrize("width", [5, 9000])
def test_softmax_options(width, what):
    x, bias = torch.randn(2, 3, 4, width), torch.randn(3, 1, width)
    mask = torch.rand(2, 1, 4, 1 if "column" in what else width) < 0.6
    mask[1, :, 2] = False
    used = mask if "mask" in what else None
    scale = -0.5 if "negative" in what else 1.0
    compare_op(
        lambda x, b: foveate.softmax(x, bias=b, mask=used, causal="causal" in what, scale=scale, backend="triton"),
        lambda x, b: reference_rows.softmax(x, -1, scale, used, b, "causal" in what),
        x,
        bias,
    )


def test_softmax_of_nothing_and_of_minus_infinity():
    assert foveate.softmax(torch.randn(3, 0), backend="triton").shape == (3, 0)
    assert foveate.softmax(torch.randn(0, 3), backend="triton").shape == (0, 3)
    x = torch.full((2, 5), float("-inf"))
    x[1, 2] = 1.0
    assert torch.equal(foveate.softmax(x, backend="triton"), torch.tensor([[0.0] * 5, [0.0, 0, 1, 0, 0]]))
    assert torch.equal(foveate.log_softmax(x[:1], backend="triton"), x[:1])


def test_softmax_of_strided_rows():
    x = torch.randn(4, 6, 5).transpose(0, 1)
    torch.testing.assert_close(foveate.softmax(x, backend="triton"), torch.softmax(x, -1))
    torch.testing.assert_close(foveate.softmax(x, 1, backend="triton"), torch.softmax(x, 1))


@pytest.mark.parametrize("width", [1, 40, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(width, dtype):
    x, weight = torch.randn(5, 7, width).to(dtype), (1 + torch.randn(width)).to(dtype)
    compare_op(
        lambda x, w: foveate.rms_norm(x, w, 1e-3, backend="triton"),
        lambda x, w: torch.rms_norm(x, (width,), w, 1e-3),
        x,
        weight,
    )


@pytest.mark.parametrize("width", [1, 40, 9000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_with_the_residual_add(width, dtype):
    x, residual, weight = (torch.randn(s).to(dtype) for s in ((5, width), (5, width), (width,)))

    def ours(x, r, w):
        out, h = foveate.rms_norm(x, w, 1e-3, residual=r, backend="triton")
        return out * 2 + h

    def peer(x, r, w):
        h = x + r
        return torch.rms_norm(h, (width,), w, 1e-3) * 2 + h

    compare_op(ours, peer, x, residual, weight)
    h = foveate.rms_norm(x, weight, 1e-3, residual=residual, backend="triton")[1]
    assert torch.equal(h, x + residual)


def test_rms_norm_without_weight():
    x = torch.randn(3, 33)
    compare_op(
        lambda x: foveate.rms_norm(x, None, 1e-5, backend="triton"), lambda x: torch.rms_norm(x, (33,), None, 1e-5), x
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "half"), [(16, 8), (24, 5), (80, 40)])
def test_rotary(interleaved, dtype, d, half):
    q, k = torch.randn(2, 5, 3, d).to(dtype), torch.randn(2, 5, 1, d).to(dtype)
    angle = torch.rand((5, half) if dtype == torch.float32 else (2, 5, half)) * 6.28

    def ours(q, k):
        turned = foveate.apply_rotary(q, k, angle.cos(), angle.sin(), interleaved=interleaved, backend="triton")
        return torch.cat([t.flatten(2) for t in turned], -1)

    def peer(q, k):
        cos, sin = angle.cos().to(q), angle.sin().to(q)
        return torch.cat([reference_rows.rotate(t, cos, sin, interleaved).to(t).flatten(2) for t in (q, k)], -1)

    compare_op(ours, peer, q, k)


CROSS_ENTROPY = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 3.0},
    {"label_smoothing": 0.3, "z_loss": 0.1, "softcap": 8.0},
]


@pytest.mark.parametrize("options", CROSS_ENTROPY, ids=str)
@pytest.mark.parametrize("width", [3, 1000, 9000])
def test_cross_entropy(width, options):
    x, target = 3 * torch.randn(6, width), torch.randint(0, width, (6,))
    target[2] = -100
    for more in ({"reduction": "none"}, {"reduction": "mean"}):
        both = options | more
        compare_op(
            functools.partial(foveate.cross_entropy, target=target, backend="triton", **both),
            functools.partial(reference_rows.cross_entropy, target=target, **both),
            x,
        )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_cross_entropy_in_half_precision(dtype):
    x, target = 3 * torch.randn(6, 500), torch.randint(0, 500, (6,))
    x[3] = float("nan")
    target[3] = -100

    def ours(x):
        return foveate.cross_entropy(x, target, backend="triton")

    def peer(x):
        return reference_rows.cross_entropy(x, target)

    compare_op(ours, peer, x.to(dtype))


def test_a_target_outside_is_refused_on_the_cpu(device):
    if device != "cpu":
        pytest.skip("checking it on a GPU would wait for the device")
    with pytest.raises(ValueError, match=r"target\[1\] = 9 is outside 0..3"):
        foveate.cross_entropy(torch.randn(2, 4), torch.tensor([0, 9]), backend="triton")
