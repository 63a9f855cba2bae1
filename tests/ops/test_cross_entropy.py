"""cross_entropy: values and gradients against torch in the same dtype, every option, bad input."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.backend.reference import rows as reference_rows
from foveate.backend.registry import Query, why_not
from op_compare import compare_op
from poison import guarded_outputs, nan_padded

pytestmark = [pytest.mark.kernels, pytest.mark.cuda]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COLUMNS = [1, 7, 63, 65, 128, 1000, 50257]
REDUCTIONS = ["mean", "sum", "none"]
BACKENDS = ["native", "reference"]


def make(
    rows: int, cols: int, dtype: torch.dtype = torch.float32, scale: float = 4.0
) -> tuple[torch.Tensor, torch.Tensor]:
    target = torch.randint(0, cols, (rows,))
    target[rows // 3] = -100
    return (torch.randn(rows, cols) * scale).to(dtype), target


def torch_loss(x, target, *, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean", ignore_index=-100):
    """The same from torch's operators."""
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(x, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    used = target != ignore_index
    loss = loss + torch.where(used, z_loss * torch.logsumexp(x, -1) ** 2, 0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / used.sum()}[reduction]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", COLUMNS)
def test_values_and_gradients(cols, dtype):
    x, target = make(max(3, min(33, 200_000 // cols)), cols, dtype)
    for reduction in REDUCTIONS:
        ours = partial(foveate.cross_entropy, target=target, reduction=reduction)
        compare_op(ours, partial(F.cross_entropy, target=target, reduction=reduction), x, same_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [9, 1003])
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"label_smoothing": 1.0},
        {"z_loss": 1e-2},
        {"softcap": 5.0},
        {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 8.0},
    ],
    ids=str,
)
def test_options(options, cols, dtype):
    x, target = make(12, cols, dtype)
    for reduction in REDUCTIONS:
        ours = partial(foveate.cross_entropy, target=target, reduction=reduction, **options)
        compare_op(ours, partial(torch_loss, target=target, reduction=reduction, **options), x, same_dtype=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_result_dtype(backend):
    for dtype in DTYPES:
        if why_not("cross_entropy", backend, Query("cpu", dtype)):  # float64, where native is the CUDA kernels
            continue
        x, target = make(5, 9, dtype)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert foveate.cross_entropy(x, target, backend=backend).dtype == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 12345])
def test_ignored_rows(ignore_index, backend):
    x, target = make(9, 11)
    target[target == -100] = 1
    target[[0, 4, 8]] = ignore_index
    x[[0, 4, 8]] = float("nan")
    x.requires_grad_()
    kept = [1, 2, 3, 5, 6, 7]
    loss = foveate.cross_entropy(
        x, target, ignore_index=ignore_index, label_smoothing=0.1, z_loss=0.1, reduction="none", backend=backend
    )
    assert loss[[0, 4, 8]].eq(0).all()
    used = target != ignore_index
    mean = foveate.cross_entropy(x, target, ignore_index=ignore_index, label_smoothing=0.1, z_loss=0.1, backend=backend)
    torch.testing.assert_close(mean, loss.sum() / used.sum())
    mean.backward()
    assert x.grad[~used].eq(0).all() and x.grad[kept].isfinite().all()
    torch.testing.assert_close(
        loss[kept],
        torch_loss(x[kept], target[kept], ignore_index=ignore_index, label_smoothing=0.1, z_loss=0.1, reduction="none"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_ignored(backend):
    x = torch.randn(4, 5, requires_grad=True)
    target = torch.full((4,), -100)
    assert foveate.cross_entropy(x, target, reduction="sum", backend=backend) == 0
    loss = foveate.cross_entropy(x, target, backend=backend)
    assert loss.isnan() and F.cross_entropy(x, target).isnan()
    loss.backward()
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("offset", [1e4, -1e4, 3e38, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("cols", [5, 1000])
def test_big_logits(cols, offset):
    x, target = make(12, cols)
    x = x + offset
    compare_op(
        lambda x: foveate.cross_entropy(x, target, reduction="none"),
        lambda x: F.cross_entropy(x, target, reduction="none"),
        x,
    )


def test_one_hot_logits_keep_small_losses():
    x = torch.full((2, 70), -1e4)
    x[0, 3], x[1, 3] = 1e4, 1e4 + 5
    x[1, 4] = 1e4
    target = torch.tensor([3, 3])
    torch.testing.assert_close(
        foveate.cross_entropy(x, target, reduction="none"),
        F.cross_entropy(x.double(), target, reduction="none").float(),
        rtol=1e-5,
        atol=0,
    )


def test_shapes_and_strides():
    x, target = torch.randn(2, 3, 4, 9), torch.randint(0, 9, (2, 3, 4))
    loss = foveate.cross_entropy(x, target, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(x.flatten(0, 2), target.flatten(), reduction="none").view(2, 3, 4))
    for strided in (
        x.transpose(0, 2),
        x.movedim(-1, 0).contiguous().movedim(0, -1),
        x[..., ::2],
        x[:1].expand(2, 3, 4, 9),
    ):
        labels = target.view(strided.shape[:-1]) % strided.shape[-1]
        leaf, packed = strided.clone().requires_grad_(), strided.contiguous().requires_grad_()
        a, b = foveate.cross_entropy(strided, labels), foveate.cross_entropy(packed, labels)
        assert torch.equal(a, b)
        foveate.cross_entropy(leaf, labels).backward()
        b.backward()
        assert torch.equal(leaf.grad, packed.grad)
    one = foveate.cross_entropy(torch.randn(9), torch.tensor(3), reduction="none")
    assert one.shape == ()


def test_every_element_is_written():
    """And nothing beside it, also in gradients large enough to be stored past the cache."""
    for rows, cols in ((5, 9), (300, 16_401)):
        x, target = make(rows, cols)
        with guarded_outputs() as guard:
            leaf = nan_padded(x).requires_grad_()
            loss = foveate.cross_entropy(leaf, target)
            loss.backward()
        guard.check()
        expected = x.clone().requires_grad_()
        F.cross_entropy(expected, target).backward()
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-8)
    assert x.numel() * x.element_size() > 16 << 20


def test_empty_batch():
    x = torch.randn(0, 5, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)
    assert foveate.cross_entropy(x, target, reduction="sum") == 0
    assert foveate.cross_entropy(x, target).isnan()
    foveate.cross_entropy(x, target, reduction="none").sum().backward()
    assert x.grad.shape == (0, 5)


def test_gradcheck():
    x, target = make(7, 11, torch.float64)
    x.requires_grad_()
    for reduction in REDUCTIONS:
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "reduction": reduction}
        assert torch.autograd.gradcheck(partial(foveate.cross_entropy, target=target, **options), (x,))


def test_compile_vmap_and_func_grad():
    x, target = make(6, 9)
    x.requires_grad_()

    def loss(x, target=target):
        return foveate.cross_entropy(x, target, z_loss=0.1) ** 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(loss(x), x)[0])
    xs, targets = torch.randn(3, 6, 9), torch.randint(0, 9, (3, 6))
    for in_dims in ((0, 0), (0, None), (None, 0)):
        args = [t if d == 0 else t[0] for t, d in zip((xs, targets), in_dims)]
        grads = torch.func.vmap(torch.func.grad(loss), in_dims=in_dims)(*args)
        for i in range(3):
            one = [t[i] if d == 0 else t for t, d in zip(args, in_dims)]
            torch.testing.assert_close(grads[i], torch.func.grad(loss)(*one))


def test_opcheck():
    x, target = make(6, 9)
    options = (-100, 0.1, 0.01, 3.0)
    loss, stats = torch.ops.foveate.cross_entropy.default(x, target, *options)
    torch.library.opcheck(torch.ops.foveate.cross_entropy.default, (x, target, *options))
    torch.library.opcheck(torch.ops.foveate.cross_entropy_backward.default, (loss, x, target, stats, *options))


def test_reference_is_the_definition():
    x, target = make(6, 9)
    options = {"label_smoothing": 0.2, "z_loss": 0.01, "softcap": 4.0}
    expected = reference_rows.cross_entropy(x, target, **options)
    torch.testing.assert_close(foveate.cross_entropy(x, target, **options), expected)
    assert torch.equal(foveate.cross_entropy(x, target, **options, backend="reference"), expected)


X, T = torch.zeros(4, 5), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: foveate.cross_entropy(X, torch.tensor([0, 1, 2, 50])),
            ValueError,
            r"target\[3\] = 50 is outside 0..4 and is not ignore_index = -100",
        ),
        (
            lambda: foveate.cross_entropy(X, torch.tensor([0, -1, 2, 3])),
            ValueError,
            r"target\[1\] = -1 is outside 0..4",
        ),
        (
            lambda: foveate.cross_entropy(X, torch.tensor([0, -100, 2, 3]), ignore_index=2),
            ValueError,
            r"target\[1\] = -100 .* ignore_index = 2",
        ),
        (
            lambda: foveate.cross_entropy(X, T[:3]),
            ValueError,
            r"target has shape \(3,\); logits of shape \(4, 5\) needs \(4,\)",
        ),
        (
            lambda: foveate.cross_entropy(X, T.int()),
            TypeError,
            "target must be an int64 tensor of class numbers, got torch.int32",
        ),
        (lambda: foveate.cross_entropy(X, X), TypeError, "got torch.float32"),
        (lambda: foveate.cross_entropy(X.long(), T), TypeError, "logits is torch.int64"),
        (lambda: foveate.cross_entropy(X[:, :0], T), ValueError, r"logits of shape \(4, 0\) have no classes"),
        (lambda: foveate.cross_entropy(X.sum(), T), ValueError, "have no classes"),
        (lambda: foveate.cross_entropy(X, T.to("meta")), ValueError, "target is on meta and logits on cpu"),
        (
            lambda: foveate.cross_entropy(X, T, label_smoothing=1.5),
            ValueError,
            r"label_smoothing=1.5 must be in \[0, 1\]",
        ),
        (lambda: foveate.cross_entropy(X, T, label_smoothing=float("nan")), ValueError, "label_smoothing=nan"),
        (lambda: foveate.cross_entropy(X, T, z_loss=-1.0), ValueError, "z_loss=-1.0 must not be negative"),
        (lambda: foveate.cross_entropy(X, T, z_loss=float("inf")), ValueError, "z_loss=inf must be a finite number"),
        (lambda: foveate.cross_entropy(X, T, softcap=-3.0), ValueError, "softcap=-3.0 must be positive"),
        (lambda: foveate.cross_entropy(X, T, reduction="avg"), ValueError, "reduction='avg' is unknown"),
        (
            lambda: foveate.cross_entropy(X, T, backend="triton"),
            foveate.UnsupportedError,
            "'triton' cannot serve cross_entropy",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
