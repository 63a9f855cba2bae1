"""softmax and log_softmax: values and gradients against torch in the same dtype, options against the definition, bad input."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.backend.reference import rows as reference_rows
from op_compare import compare_op
from poison import guarded_outputs, nan_padded

pytestmark = [pytest.mark.kernels, pytest.mark.cuda]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One lane, below and above vectors and groups of vectors of every instruction set, beyond the rows whose exp is kept.
COLUMNS = [1, 7, 63, 65, 128, 1000, 50257]
BACKENDS = ["native", "reference"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_values_and_gradients(cols, dtype):
    x = (torch.randn(max(1, min(33, 200_000 // cols)), cols) * 4).to(dtype)
    compare_op(foveate.softmax, lambda x: torch.softmax(x, -1), x)
    compare_op(foveate.log_softmax, lambda x: torch.log_softmax(x, -1), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_dim(dim, backend):
    x = torch.randn(5, 7, 9)
    compare_op(lambda x: foveate.softmax(x, dim, backend=backend), lambda x: torch.softmax(x, dim), x)
    compare_op(lambda x: foveate.log_softmax(x, dim, backend=backend), lambda x: torch.log_softmax(x, dim), x)


def test_strides():
    x = torch.randn(6, 40, 3, 17).transpose(0, 2)[:, ::3, 1:, :11]
    assert not x.is_contiguous()
    assert torch.equal(foveate.softmax(x), foveate.softmax(x.contiguous()))
    turned = torch.randn(17, 5).t()
    assert torch.equal(foveate.softmax(turned), foveate.softmax(turned.contiguous()))
    row = torch.randn(65).expand(4, 65)
    assert torch.equal(foveate.softmax(row), foveate.softmax(row.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [9, 130, 20_000])
@pytest.mark.parametrize("options", ["scale", "bias", "mask", "causal", "all"])
def test_options(options, cols, dtype):
    rows = 12
    chosen = {"scale", "bias", "mask", "causal"} if options == "all" else {options}
    x, bias = (torch.randn(2, 3, rows, cols) * 3).to(dtype), torch.randn(3, 1, cols).to(dtype)
    mask = torch.rand(2, 1, rows, cols) > 0.3
    mask[1, 0, 5] = False
    scale = 0.37 if "scale" in chosen else None
    mask = mask if "mask" in chosen else None
    causal = "causal" in chosen

    def ours(x, bias=None):
        return foveate.softmax(x, scale=scale, bias=bias, mask=mask, causal=causal)

    def peer(x, bias=None):
        s = x * (1.0 if scale is None else scale)
        s = s if bias is None else s + bias
        keep = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask.expand(x.shape)
        if causal:
            keep = keep & torch.ones(rows, cols, dtype=torch.bool).tril(cols - rows)
        empty = ~keep.any(-1, keepdim=True)
        return torch.where(empty, 0, torch.softmax(torch.where(keep | empty, s, float("-inf")), -1))

    compare_op(ours, peer, x, *([bias] if "bias" in chosen else []))


@pytest.mark.parametrize("shape", [(1,), (1, 1), (4, 1), (3, 1, 33), (1, 33), (2, 1, 4, 1), (2, 3, 4, 33)])
def test_bias_and_mask_broadcast(shape):
    x, bias, mask = torch.randn(2, 3, 4, 33), torch.randn(shape), torch.rand(shape) > 0.4
    expected = reference_rows.softmax(x, -1, 1.0, mask, bias)
    torch.testing.assert_close(foveate.softmax(x, bias=bias, mask=mask), expected)
    grads = []
    for backend in BACKENDS:
        leaf = bias.clone().requires_grad_()
        foveate.softmax(x, bias=leaf, mask=mask, backend=backend).square().sum().backward()
        grads.append(leaf.grad)
    assert grads[0].shape == bias.shape
    torch.testing.assert_close(*grads)


def test_options_over_another_dimension():
    x, bias, mask = torch.randn(3, 8, 5), torch.randn(8, 1), torch.rand(3, 8, 1) > 0.3
    out = foveate.softmax(x, 1, bias=bias, mask=mask, scale=-2.0)
    torch.testing.assert_close(out, reference_rows.softmax(x, 1, -2.0, mask, bias))


def test_bias_strides_and_wider_bias():
    x = torch.randn(4, 16, 65).to(torch.bfloat16)
    wide = torch.randn(65, 16).t()
    torch.testing.assert_close(foveate.softmax(x, bias=wide), reference_rows.softmax(x, bias=wide))
    mask = (torch.rand(65, 16) > 0.5).t()
    torch.testing.assert_close(foveate.softmax(x, mask=mask), reference_rows.softmax(x, mask=mask))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (1, 7), (7, 1)])
def test_causal_is_bottom_right(shape, backend):
    rows, cols = shape
    out = foveate.softmax(torch.zeros(2, rows, cols), causal=True, backend=backend)
    seen = (torch.arange(rows) + 1 + cols - rows).clamp(min=0)
    expected = (torch.arange(cols) < seen[:, None]) / seen.clamp(min=1)[:, None]
    torch.testing.assert_close(out, expected.expand(2, rows, cols))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cols", [5, 200, 20_000])
def test_empty_rows_are_zero(cols, backend):
    x = torch.randn(3, cols)
    x[1] = float("-inf")
    x.requires_grad_()
    mask = torch.ones(3, cols, dtype=torch.bool)
    mask[2] = False
    out = foveate.softmax(x, mask=mask, backend=backend)
    assert out[1:].eq(0).all() and out[0].sum() > 0.99
    out.square().sum().backward()
    assert x.grad[1:].eq(0).all() and x.grad.isfinite().all()
    assert foveate.log_softmax(x, backend=backend)[1].eq(float("-inf")).all()


@pytest.mark.parametrize("cols", [6, 200, 20_000])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_reach_only_their_row(value, cols):
    x = torch.randn(3, cols)
    x[1, cols // 2] = value
    for function in (foveate.softmax, foveate.log_softmax):
        out = function(x)
        assert out[[0, 2]].isfinite().all()
    assert foveate.softmax(x)[1].isnan().all()
    hidden = torch.arange(cols) != cols // 2
    torch.testing.assert_close(
        foveate.softmax(x, mask=hidden), torch.softmax(x.masked_fill(~hidden, float("-inf")), -1)
    )


@pytest.mark.parametrize("cols", [33, 20_000])
@pytest.mark.parametrize("offset", [3e4, -3e4, torch.finfo(torch.float32).min])
def test_big_logits(offset, cols):
    x = torch.randn(4, cols) + offset
    compare_op(foveate.softmax, lambda x: torch.softmax(x, -1), x)
    spread = torch.tensor([torch.finfo(torch.float32).min, 0.0, 3e38]).repeat(1, cols)
    torch.testing.assert_close(foveate.softmax(spread), torch.softmax(spread, -1))


def test_every_element_is_written():
    """And nothing beside it, also in outputs large enough to be stored past the cache, where a row starts at every alignment."""
    for shape in ((5, 9), (300, 16_401)):
        x = torch.randn(shape)
        with guarded_outputs() as guard:
            out = foveate.softmax(nan_padded(x), causal=shape == (5, 9))
            log = foveate.log_softmax(nan_padded(x))
        guard.check()
        torch.testing.assert_close(log, torch.log_softmax(x, -1))
        torch.testing.assert_close(out, reference_rows.softmax(x, causal=shape == (5, 9)))
    assert x.numel() * x.element_size() > 16 << 20


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 4)])
def test_empty_tensors(shape):
    x = torch.randn(shape, requires_grad=True)
    for function in (foveate.softmax, foveate.log_softmax):
        out = function(x)
        out.sum().backward()
        assert out.shape == x.shape and x.grad.shape == x.shape


def test_no_dimensions():
    x = torch.tensor(3.0)
    assert foveate.softmax(x) == 1 and foveate.log_softmax(x, 0) == 0


def test_gradcheck():
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(6) > 0.3
    assert torch.autograd.gradcheck(
        lambda x, b: foveate.softmax(x, scale=0.5, bias=b, mask=mask, causal=True), (x, bias)
    )
    assert torch.autograd.gradcheck(lambda x: foveate.softmax(x, 1, scale=-2.0), (x,))
    assert torch.autograd.gradcheck(lambda x: foveate.log_softmax(x, 0), (x,))


def test_compile_is_eager():
    x, bias = torch.randn(3, 8, 8, requires_grad=True), torch.randn(8, 1, requires_grad=True)

    def loss(x, bias):
        return (foveate.softmax(x, bias=bias, causal=True) ** 2).sum() + foveate.log_softmax(x, 1).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, bias), (x, bias)), torch.autograd.grad(loss(x, bias), (x, bias))):
        assert torch.equal(a, b)


def test_vmap_and_func_grad():
    x, bias = torch.randn(5, 3, 4, 7), torch.randn(3, 1, 7)
    mask = torch.rand(5, 1, 1, 7) > 0.2

    def loss(x, bias, mask):
        return (foveate.softmax(x, bias=bias, mask=mask) ** 2).sum() + foveate.log_softmax(x, 0).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None, 0))(x, bias, mask)
    for i in range(5):
        for mapped, one in zip(grads, torch.func.grad(loss, argnums=(0, 1))(x[i], bias, mask[i])):
            torch.testing.assert_close(mapped[i], one)


def test_opcheck():
    x, bias, mask = torch.randn(2, 3, 8), torch.randn(1, 3, 1), torch.rand(1, 1, 8) > 0.5
    ops = torch.ops.foveate
    torch.library.opcheck(ops.softmax.default, (x, bias, mask, 0.5, True))
    torch.library.opcheck(ops.softmax.default, (x.transpose(0, 2), None, None, 1.0, False))
    torch.library.opcheck(ops.log_softmax.default, (x,))
    torch.library.opcheck(ops.softmax_backward.default, (x, x, 0.5, False, True))


def test_meta():
    x = torch.randn(2, 3, device="meta")
    assert foveate.softmax(x).shape == x.shape


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_bits(threads):
    x = torch.randn(2, 3, 100, 300)
    expected = foveate.softmax(x, causal=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(foveate.softmax(x, causal=True), expected)
    finally:
        torch.set_num_threads(before)


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: foveate.softmax([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: foveate.softmax(X.int()), TypeError, "x is torch.int32; it must be float32"),
        (lambda: foveate.softmax(X, 2), ValueError, "dim=2 is out of range for x with 2 dimensions"),
        (lambda: foveate.log_softmax(X, -3), ValueError, "dim=-3 is out of range"),
        (lambda: foveate.softmax(X, scale=float("nan")), ValueError, "scale=nan must be a finite number"),
        (lambda: foveate.softmax(X, 0, causal=True), ValueError, "causal masks the last two dimensions"),
        (lambda: foveate.softmax(X[0], causal=True), ValueError, "x has 1 dimensions"),
        (lambda: foveate.softmax(X, mask=X), TypeError, "mask must be a bool tensor"),
        (
            lambda: foveate.softmax(X, mask=torch.ones(2, dtype=torch.bool)),
            ValueError,
            r"mask of shape \(2,\) does not broadcast",
        ),
        (
            lambda: foveate.softmax(X, bias=torch.zeros(1, 2, 3)),
            ValueError,
            r"bias of shape \(1, 2, 3\) does not broadcast",
        ),
        (lambda: foveate.softmax(X, bias=X.half()), TypeError, "bias is torch.float16 and x is torch.float32"),
        (lambda: foveate.softmax(X, bias=X.to("meta")), ValueError, "bias is on meta and x on cpu"),
        (lambda: foveate.softmax(X, backend="cuda"), ValueError, "backend='cuda' is unknown"),
        (
            lambda: foveate.softmax(X, backend="triton"),
            foveate.UnsupportedError,
            "backend='triton' cannot serve softmax",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


OTHER_DIMS = [((3, 21, 40), 1), ((2, 5, 3, 17), 1), ((2, 5, 3, 17), 2), ((700, 9), 0), ((1, 600, 64), 1), ((4, 1, 30), 1), ((0, 3, 9), 1),
              ((3, 0, 9), 1), ((5, 3, 1), 1), ((4, 6, 7), 1), ((2, 70000, 8), 1)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "dim"), OTHER_DIMS, ids=str)
def test_other_dimensions_in_place(shape, dim, dtype):
    """Lanes beside each other, their rest, too few of them, columns longer than what is kept; values, gradients, layout."""
    if dtype is not torch.float32 and max(shape) > 1000:
        pytest.skip("the long column once")
    x = torch.randn(shape).to(dtype)
    for ours, peer in ((foveate.softmax, torch.softmax), (foveate.log_softmax, torch.log_softmax)):
        compare_op(lambda x, f=ours: f(x, dim), lambda x, f=peer: f(x, dim), x)
        out = ours(x.requires_grad_(), dim)
        assert out.is_contiguous() and out.view(-1).shape == (x.numel(),)
        (transposed,) = torch.autograd.grad(out.movedim(dim, 0), x, torch.ones_like(out).movedim(dim, 0))
        assert transposed.shape == x.shape
        x = x.detach()


@pytest.mark.parametrize("cols", [1, 2, 3, 7, 8, 15, 16, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_shorter_than_a_vector(cols, dtype):
    for rows in (1, 63, 64, 65, 5000 // cols):
        x = torch.randn(rows, cols).to(dtype)
        compare_op(lambda x: foveate.softmax(x, scale=0.7), lambda x: torch.softmax(0.7 * x, -1), x)
        compare_op(foveate.log_softmax, lambda x: torch.log_softmax(x, -1), x)
    strided = torch.randn(40, 2 * cols).to(dtype)[::2, :cols]
    assert torch.equal(foveate.softmax(strided), foveate.softmax(strided.contiguous()))


@pytest.mark.parametrize("shape", [(3, 40, 32), (50, 7)], ids=str)
def test_values_that_are_not_finite_stay_in_their_line(shape):
    """-inf and NaN down a column and in a short row, as in the rows of softmax."""
    dim = 1
    x = torch.randn(shape)
    lines = x.movedim(dim, -1)  # a view: what is set here is set in x
    lines[0] = float("-inf")
    lines[1][..., 2] = float("-inf")
    lines[2][..., 3] = float("nan")
    out, log = foveate.softmax(x, dim).movedim(dim, -1), foveate.log_softmax(x, dim).movedim(dim, -1)
    assert out[0].eq(0).all() and log[0].isneginf().all()
    torch.testing.assert_close(out[1], lines[1].softmax(-1))
    assert out[2].isnan().all() and log[2].isnan().all()
    torch.testing.assert_close(out[3:], lines[3:].softmax(-1))
    torch.testing.assert_close(log[3:], lines[3:].log_softmax(-1))


def test_other_dimensions_under_transforms():
    x = torch.randn(3, 21, 40)
    torch.testing.assert_close(torch.func.vmap(lambda t: foveate.softmax(t, 0))(x), x.softmax(1))
    torch.library.opcheck(torch.ops.foveate.softmax.default, (x.movedim(1, -1), None, None, 1.0, False))
    torch.library.opcheck(torch.ops.foveate.log_softmax.default, (x.movedim(1, -1),))
    out = foveate.softmax(x, 1).movedim(1, -1)
    for wide in (False, True):
        torch.library.opcheck(torch.ops.foveate.softmax_backward.default, (x.movedim(1, -1), out, 1.0, False, wide))
        torch.library.opcheck(
            torch.ops.foveate.softmax_backward.default, (x.movedim(1, -1).contiguous(), out, 1.0, False, wide)
        )
