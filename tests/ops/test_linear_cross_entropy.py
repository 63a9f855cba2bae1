"""linear_cross_entropy: against torch's linear + cross_entropy, chunk borders, memory, every option, bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.backend.reference import rows as reference_rows
from foveate.ops.cross_entropy import linear
from op_compare import compare_op

pytestmark = pytest.mark.sanitize

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["mean", "sum", "none"]
BACKENDS = ["native", "reference"]


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Small chunks, so that few tokens cross their borders."""
    if request.param == "many chunks":
        monkeypatch.setattr(linear, "_CHUNK_BYTES", 1)
        monkeypatch.setattr(linear, "_MIN_CHUNK_TOKENS", 4)
    target = torch.arange(10)
    count = len(list(linear._chunks(target, 10, 4, -100)))
    assert count == (3 if request.param == "many chunks" else 1)


def make(tokens: int, k: int, vocab: int, dtype: torch.dtype = torch.float32):
    hidden, weight = torch.randn(tokens, k).to(dtype), (torch.randn(vocab, k) * 0.3).to(dtype)
    target = torch.randint(0, vocab, (tokens,))
    target[::5] = -100
    return hidden, weight, torch.randn(vocab).to(dtype), target


def torch_loss(hidden, weight, bias, target, *, label_smoothing=0.0, z_loss=0.0, softcap=None, reduction="mean"):
    x = F.linear(hidden, weight, bias)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    loss = F.cross_entropy(x, target, label_smoothing=label_smoothing, reduction="none")
    used = target != -100
    loss = loss + torch.where(used, z_loss * torch.logsumexp(x, -1) ** 2, 0)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / used.sum()}[reduction]


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("tokens", "k", "vocab"), [(37, 16, 65), (9, 40, 1003)])
def test_values_and_gradients(tokens, k, vocab, reduction, dtype):
    hidden, weight, bias, target = make(tokens, k, vocab, dtype)
    compare_op(
        lambda h, w, b: foveate.linear_cross_entropy(h, w, target, bias=b, reduction=reduction),
        lambda h, w, b: torch_loss(h, w, b, target, reduction=reduction),
        hidden,
        weight,
        bias,
        same_dtype=False,
    )


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 5.0},
        {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 8.0},
    ],
    ids=str,
)
def test_options(options, reduction, backend):
    hidden, weight, _, target = make(21, 16, 65)
    compare_op(
        lambda h, w: foveate.linear_cross_entropy(h, w, target, reduction=reduction, backend=backend, **options),
        lambda h, w: torch_loss(h, w, None, target, reduction=reduction, **options),
        hidden,
        weight,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_some_gradients(needed, reduction):
    *tensors, target = make(11, 8, 17)
    leaves = [t.requires_grad_(bool(n)) for t, n in zip(tensors, needed)]
    foveate.linear_cross_entropy(*leaves[:2], target, bias=leaves[2], reduction=reduction).sum().backward()
    expected = [t.detach().clone().requires_grad_() for t in leaves]
    torch_loss(*expected, target, reduction=reduction).sum().backward()
    for leaf, full, need in zip(leaves, expected, needed):
        if need:
            torch.testing.assert_close(leaf.grad, full.grad)
        else:
            assert leaf.grad is None


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_may_be_nan(reduction, backend):
    hidden, weight, _, target = make(21, 8, 17)
    used = target != -100
    hidden[~used] = float("nan")
    hidden.requires_grad_(), weight.requires_grad_()
    loss = foveate.linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend)
    loss.sum().backward()
    expected = [hidden.detach()[used].requires_grad_(), weight.detach().clone().requires_grad_()]
    torch_loss(*expected, None, target[used], reduction=reduction).sum().backward()
    torch.testing.assert_close(hidden.grad[used], expected[0].grad)
    torch.testing.assert_close(weight.grad, expected[1].grad)
    assert hidden.grad[~used].eq(0).all()
    if reduction == "none":
        assert loss[~used].eq(0).all()


def test_all_rows_ignored():
    hidden, weight, _, target = make(6, 8, 17)
    target[:] = -100
    hidden.requires_grad_()
    assert foveate.linear_cross_entropy(hidden, weight, target, reduction="sum") == 0
    assert foveate.linear_cross_entropy(hidden, weight, target).isnan()


def test_mean_of_many_float16_tokens_keeps_its_gradient():
    """1 / tokens times a probability is below float16's range; the factor comes after the products."""
    hidden, weight, _, _ = make(4000, 8, 300, torch.float16)
    target = torch.randint(0, 300, (4000,))
    weight.requires_grad_()
    foveate.linear_cross_entropy(hidden, weight, target).backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(F.linear(hidden.double(), exact), target).backward()
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=5e-3, atol=2e-6)


@pytest.mark.parametrize("spread", [1.0, 60.0], ids=["untrained", "trained"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_outlive_a_loss_scale(reduction, spread):
    """As good as linear + cross_entropy under torch.amp.GradScaler's 65536: no gradient rounds to 0 before the scale arrives."""
    hidden, weight = (torch.randn(4096, 16) * spread).half(), (torch.randn(256, 16) * 0.02).half()
    target = (hidden.float() @ weight.float().T).argmax(-1)
    scale = 65536.0

    def gradients(function, dtype, factor):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        (function(*leaves).mean() * factor).backward()
        return [leaf.grad.double() / factor for leaf in leaves]

    exact = gradients(lambda h, w: F.cross_entropy(h @ w.T, target), torch.float64, 1.0)
    theirs = gradients(lambda h, w: F.cross_entropy(F.linear(h, w).float(), target), torch.float16, scale)
    ours = gradients(lambda h, w: foveate.linear_cross_entropy(h, w, target, reduction=reduction), torch.float16, scale)
    for mine, peer, right in zip(ours, theirs, exact):
        assert (mine - right).norm() <= 2 * (peer - right).norm()
        assert ((mine == 0) & (right != 0)).double().mean() < 1e-3  # torch loses as few


def test_backward_over_a_graph_that_is_kept_gives_the_same_again():
    """The last pass scales the saved gradients in place."""
    hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
    loss = 3.0 * foveate.linear_cross_entropy(hidden, weight, torch.randint(0, 30, (7,)))
    found = [
        torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5), retain_graph=keep)
        for keep in (True, True, False)
    ]
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again))


def test_logits_are_not_stored():
    """The largest tensor that is allocated is one chunk of logits."""
    vocab, tokens = 40_000, 2048
    hidden, weight, _, _ = make(tokens, 4, vocab)
    target = torch.randint(0, vocab, (tokens,))
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        foveate.linear_cross_entropy(hidden, weight, target).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    chunk = max(linear._CHUNK_BYTES, linear._MIN_CHUNK_TOKENS * vocab * 4)
    assert chunk // 2 < largest <= chunk < tokens * vocab * 4 // 4


def test_shapes_and_strides():
    hidden, weight, bias, _ = make(24, 10, 33)
    target = torch.randint(0, 33, (2, 3, 4))
    loss = foveate.linear_cross_entropy(hidden.view(2, 3, 4, 10), weight, target, bias=bias, reduction="none")
    torch.testing.assert_close(loss, torch_loss(hidden, weight, bias, target.flatten(), reduction="none").view(2, 3, 4))
    turned = foveate.linear_cross_entropy(hidden.t().contiguous().t(), weight.t().contiguous().t(), target.flatten())
    torch.testing.assert_close(turned, torch_loss(hidden, weight, None, target.flatten()))
    one = foveate.linear_cross_entropy(hidden[0], weight, torch.tensor(3), reduction="none")
    assert one.shape == ()


def test_empty():
    hidden, weight, _, target = make(0, 8, 17)
    hidden.requires_grad_()
    loss = foveate.linear_cross_entropy(hidden, weight, target, reduction="sum")
    loss.backward()
    assert loss == 0 and hidden.grad.shape == (0, 8)


def test_gradcheck():
    hidden, weight, bias, target = (t.requires_grad_(t.is_floating_point()) for t in make(7, 5, 11, torch.float64))
    for reduction in REDUCTIONS:
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0, "reduction": reduction}
        call = lambda h, w, b: foveate.linear_cross_entropy(h, w, target, bias=b, **options)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile_and_func_grad(reduction):
    hidden, weight, bias, target = make(7, 5, 11)

    def loss(h, w, b):
        return (foveate.linear_cross_entropy(h, w, target, bias=b, reduction=reduction) ** 2).sum()

    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    functional = torch.func.grad(loss, argnums=(0, 1, 2))(*(t.detach() for t in leaves))
    for a, b, c in zip(eager, compiled, functional):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_autocast():
    hidden, weight, bias, target = make(7, 16, 11)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = foveate.linear_cross_entropy(hidden.to(torch.bfloat16), weight, target, bias=bias)
    loss.backward()
    half = [t.detach().to(torch.bfloat16) for t in (hidden, weight, bias)]
    assert torch.equal(loss, foveate.linear_cross_entropy(half[0], half[1], target, bias=half[2]))
    assert weight.grad.dtype == torch.float32


def test_opcheck():
    hidden, weight, bias, target = make(7, 5, 11)
    options = (-100, 0.1, 0.01, 3.0)
    torch.library.opcheck(torch.ops.foveate.linear_cross_entropy.default, (hidden, weight, bias, target, *options))
    needed = (True, False, True)
    args = (hidden, weight, bias, target, torch.ones(7), torch.ones(()), *needed, *options)
    torch.library.opcheck(torch.ops.foveate.linear_cross_entropy_gradients.default, args)


def test_reference_is_the_definition():
    hidden, weight, bias, target = make(7, 5, 11)
    expected = reference_rows.linear_cross_entropy(hidden, weight, target, bias)
    assert torch.equal(foveate.linear_cross_entropy(hidden, weight, target, bias=bias, backend="reference"), expected)


H, W, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: foveate.linear_cross_entropy(H, W, torch.tensor([0, 1, 2, 5])),
            ValueError,
            r"target\[3\] = 5 is outside 0..4 and is not",
        ),
        (
            lambda: foveate.linear_cross_entropy(H, W[:, :2], T),
            ValueError,
            r"weight \[V, K\] with V > 0; got \(4, 3\) and \(5, 2\)",
        ),
        (lambda: foveate.linear_cross_entropy(H, W[:0], T), ValueError, "with V > 0"),
        (
            lambda: foveate.linear_cross_entropy(H, W.half(), T),
            TypeError,
            "weight is torch.float16 and hidden is torch.float32",
        ),
        (
            lambda: foveate.linear_cross_entropy(H, W, T, bias=torch.zeros(4)),
            ValueError,
            r"bias has shape \(4,\); weight .* needs \(5,\)",
        ),
        (
            lambda: foveate.linear_cross_entropy(H, W, T, bias=torch.zeros(5).double()),
            TypeError,
            "bias is torch.float64",
        ),
        (lambda: foveate.linear_cross_entropy(H, W.to("meta"), T), ValueError, "weight is on meta and hidden on cpu"),
        (
            lambda: foveate.linear_cross_entropy(H, W, T[:2]),
            ValueError,
            r"target has shape \(2,\); hidden of shape \(4, 3\) needs \(4,\)",
        ),
        (lambda: foveate.linear_cross_entropy(H, W, T, reduction="avg"), ValueError, "reduction='avg' is unknown"),
        (lambda: foveate.linear_cross_entropy(H, W, T, label_smoothing=-0.1), ValueError, "label_smoothing=-0.1"),
        (
            lambda: foveate.linear_cross_entropy(H, W, T, backend="triton"),
            foveate.UnsupportedError,
            "backend='triton' cannot serve linear_cross_entropy",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
