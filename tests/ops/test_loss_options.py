"""cross_entropy and linear_cross_entropy beyond class numbers in the last dimension: torch's and Liger's options, against fp64."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import foveate

V, ROWS = 37, 9
REDUCTIONS = ["mean", "sum", "none"]


def inputs(soft=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(ROWS, V, generator=generator) * 2).to(dtype)
    target = torch.randint(0, V, (ROWS,), generator=generator)
    target[4] = -100
    if soft:
        target = torch.rand(ROWS, V, generator=generator).softmax(-1).to(dtype)
    return logits, target, torch.rand(V, generator=generator) + 0.1


def compare(ours, exact, *leaves, factor=16):
    """Value and gradients of ours(*leaves) and of exact(*leaves in fp64)."""
    mine = [x.detach().clone().requires_grad_() for x in leaves]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    out, want = ours(*mine), exact(*wide)
    eps = torch.finfo(leaves[0].dtype).eps
    torch.testing.assert_close(out.double(), want, rtol=factor * torch.finfo(out.dtype).eps, atol=factor * 1e-7)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(out, mine, direction.to(out.dtype))
    for a, b in zip(found, torch.autograd.grad(want, wide, direction)):
        torch.testing.assert_close(a.double(), b, rtol=factor * eps, atol=factor * eps * float(b.abs().max()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_class_weights_and_probabilities_are_torchs(dtype, soft, smoothing, reduction):
    logits, target, weight = inputs(soft, dtype)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    weight = weight.to(torch.float64 if dtype == torch.float64 else torch.float32)
    for w in (None, weight):
        compare(
            lambda x, w=w: foveate.cross_entropy(x, target, weight=w, class_probabilities=soft, **options),
            lambda x, w=w: F.cross_entropy(
                x, target.double() if soft else target, None if w is None else w.double(), **options
            ),
            logits,
        )


def test_probabilities_have_a_gradient_and_may_be_0():
    logits, target, _ = inputs(soft=True)
    soft_loss = functools.partial(foveate.cross_entropy, class_probabilities=True)
    compare(soft_loss, F.cross_entropy, logits, target)
    logits[:, 3], target[:, 3] = float("-inf"), 0.0
    assert soft_loss(logits, target).isfinite()  # 0 * -log 0 counts 0; torch's is NaN
    target[:, 3] = 0.1
    assert soft_loss(logits, target).isinf()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, V), (2, V, 5), (2, V, 3, 4), (1, V, 0)], ids=str)
def test_classes_in_dim_1(shape, reduction):
    logits = torch.randn(shape)
    target = torch.randint(0, V, (shape[0], *shape[2:]))
    if target.numel() == 0:
        want = F.cross_entropy(logits, target, reduction=reduction)
        found = foveate.cross_entropy(logits, target, dim=1, reduction=reduction)
        torch.testing.assert_close(found, want, equal_nan=True)
        return
    compare(
        lambda x: foveate.cross_entropy(x, target, dim=1, reduction=reduction),
        lambda x: F.cross_entropy(x, target, reduction=reduction),
        logits,
    )


def test_probabilities_in_dim_1():
    logits, target = torch.randn(2, V, 5), torch.rand(2, V, 5)
    compare(
        lambda x: foveate.cross_entropy(x, target, dim=1, class_probabilities=True),
        lambda x: F.cross_entropy(x, target.double()),
        logits,
    )


def rows_in_fp64(logits, target, weight=None, z=0.0, softcap=None):
    x = logits.double() if softcap is None else softcap * torch.tanh(logits.double() / softcap)
    lse, used = x.logsumexp(-1), target != -100
    index = target.clamp(min=0)
    nll = (lse - x.gather(-1, index[:, None]).squeeze(-1)) * (1 if weight is None else weight.double()[index])
    p = (x.gather(-1, index[:, None]).squeeze(-1) - lse).exp().detach()
    return torch.where(used, nll, 0), torch.where(used, z * lse * lse, 0), p, used, x.argmax(-1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("scaling", [False, True])
def test_further_results(scaling, softcap, reduction):
    logits, target, _ = inputs()
    target[0] = int(logits[0].argmax())
    options = {"z_loss": 0.05, "softcap": softcap, "reduction": reduction, "use_token_scaling": scaling}
    asked = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}

    def exact(x):
        nll, z, p, used, _ = rows_in_fp64(x, target, z=0.05, softcap=softcap)
        loss, z = (t * p if scaling else t for t in (nll + z, z))
        loss, z = (
            t if reduction == "none" else t.sum() / (used.sum() if reduction == "mean" else 1) for t in (loss, z)
        )
        return loss, z

    compare(lambda x: foveate.cross_entropy(x, target, **options, **asked).loss, lambda x: exact(x)[0], logits)
    got = foveate.cross_entropy(logits, target, **options, **asked)
    assert isinstance(got, foveate.CrossEntropyOutput)
    torch.testing.assert_close(got.z_loss.double(), exact(logits)[1], rtol=1e-5, atol=1e-6)
    *_, used, best = rows_in_fp64(logits, target)
    assert torch.equal(got.predicted_tokens, torch.where(used, best, -1))
    hits = ((best == target) & used).float()
    assert hits.sum() > 0
    torch.testing.assert_close(got.token_accuracy, hits if reduction == "none" else hits.sum() / used.sum())
    only = foveate.cross_entropy(logits, target, return_predicted_tokens=True)
    assert only.z_loss is None and only.token_accuracy is None
    reference = foveate.cross_entropy(logits, target, **options, **asked, backend="reference")
    for a, b in zip(got, reference):
        torch.testing.assert_close(a, b)


def test_weights_leave_the_z_term_alone():
    logits, target, weight = inputs()

    def exact(x):
        nll, z, _, used, _ = rows_in_fp64(x, target, weight, z=0.1)
        return nll.sum() / torch.where(used, weight.double()[target.clamp(min=0)], 0).sum() + z.sum() / used.sum()

    compare(lambda x: foveate.cross_entropy(x, target, weight=weight, z_loss=0.1), exact, logits)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"ce_weight": True},
        {"ce_weight": True, "label_smoothing": 0.1, "z_loss": 0.02},
        {"use_token_scaling": True, "softcap": 5.0},
        {"use_token_scaling": True, "z_loss": 0.02},
        {"class_probabilities": True},
    ],
    ids=str,
)
def test_linear_cross_entropy_is_cross_entropy_of_the_logits(options, bias, reduction):
    options = dict(options)
    _, target, weight = inputs(options.get("class_probabilities", False))
    class_weight = weight if options.pop("ce_weight", False) else None
    hidden, layer, b = torch.randn(ROWS, 16), torch.randn(V, 16) / 4, torch.randn(V)
    leaves = (hidden, layer, b) if bias else (hidden, layer)

    def ours(h, w, b=None):
        return foveate.linear_cross_entropy(
            h, w, target, bias=b, ce_weight=class_weight, reduction=reduction, **options
        )

    def exact(h, w, b=None):
        labels = target.double() if target.is_floating_point() else target
        wide = None if class_weight is None else class_weight.double()
        logits = F.linear(h, w, b)
        return foveate.cross_entropy(logits, labels, weight=wide, reduction=reduction, backend="reference", **options)

    compare(ours, exact, *leaves, factor=64)


def test_linear_cross_entropy_gives_further_results():
    _, target, _ = inputs()
    hidden, layer = torch.randn(ROWS, 16), torch.randn(V, 16)
    asked = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True, "z_loss": 0.1}
    got = foveate.linear_cross_entropy(hidden, layer, target, **asked)
    want = foveate.cross_entropy(hidden @ layer.T, target, **asked)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_in_another_dtype(dtype):
    logits, target, _ = inputs(dtype=dtype)
    loss = foveate.cross_entropy(logits.requires_grad_(), target, dtype=dtype, return_z_loss=True, z_loss=0.1)
    assert loss.loss.dtype == loss.z_loss.dtype == dtype
    loss.loss.backward()
    assert logits.grad.dtype == dtype
    assert torch.equal(loss.loss, foveate.cross_entropy(logits, target, z_loss=0.1).to(dtype))
    hidden = torch.randn(ROWS, 8, dtype=dtype)
    assert foveate.linear_cross_entropy(hidden, torch.randn(V, 8, dtype=dtype), target, dtype=dtype).dtype == dtype


@pytest.mark.skipif(foveate.backends()["native"] is not None, reason="no compiled module")
def test_what_the_kernels_cannot_do_is_refused_by_name():
    logits, target, weight = inputs()
    soft = torch.rand(ROWS, V)
    hidden, layer = torch.randn(ROWS, 8), torch.randn(V, 8)
    linear = foveate.linear_cross_entropy
    for call, words in (
        (
            lambda: foveate.cross_entropy(logits, soft, class_probabilities=True, backend="native"),
            "class probabilities .*backends that can: reference",
        ),
        (lambda: foveate.cross_entropy(logits, target, weight=weight, z_loss=0.1, backend="native"), "class weights"),
        (lambda: linear(hidden, layer, target, return_z_loss=True, backend="native"), "predicted tokens"),
        (lambda: linear(hidden, layer, target, use_token_scaling=True, z_loss=0.1, backend="native"), "token_scaling"),
    ):
        with pytest.raises(foveate.UnsupportedError, match=words):
            call()
    foveate.cross_entropy(logits, target, weight=weight, use_token_scaling=True, backend="native")
    linear(hidden, layer, target, ce_weight=weight, use_token_scaling=True, backend="native")


def test_bad_input():
    logits, target, weight = inputs()
    soft = torch.rand(ROWS, V)
    ce = foveate.cross_entropy
    soft_loss = functools.partial(ce, class_probabilities=True)
    for call, words in (
        (lambda: ce(logits, target, weight=weight[:-1]), "weight has shape"),
        (lambda: ce(logits, target, weight=weight.half()), "weight is torch.float16"),
        (lambda: ce(logits, target, weight=[1.0] * V), "weight must be a torch.Tensor"),
        (lambda: soft_loss(logits, soft[:, :-1]), "class_probabilities=True it must have the shape"),
        (lambda: soft_loss(logits, target), "target is torch.int64"),
        (lambda: ce(logits, soft), "pass class_probabilities=True"),
        (lambda: ce(torch.randn(2, V, 5), torch.zeros(2, 5, dtype=torch.long)), "need dim=1"),
        (lambda: soft_loss(logits, soft, ignore_index=3), "ignore_index=3 is for class numbers"),
        (lambda: soft_loss(logits, soft, use_token_scaling=True), "use_token_scaling=True needs class numbers"),
        (lambda: soft_loss(logits, soft, return_token_accuracy=True), "return_token_accuracy=True needs class numbers"),
        (lambda: ce(logits, target, dim=2), "dim=2 is out of range"),
        (lambda: ce(logits, target, dim=1.0), "dim=1.0"),
        (lambda: ce(logits, target, dtype=torch.int32), "dtype=torch.int32"),
        (lambda: ce(logits, target, dtype="bf16"), "dtype=bf16"),
        (lambda: ce(logits, target, return_z_loss="yes"), "return_z_loss must be True or False"),
        (lambda: ce(logits, target.float()), "target must be an int64 tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            call()


def test_compiled():
    logits, target, weight = inputs()
    f = lambda x: foveate.cross_entropy(x, target, weight=weight, return_predicted_tokens=True)  # noqa: E731
    got, want = torch.compile(f, fullgraph=True, backend="aot_eager")(logits), f(logits)
    torch.testing.assert_close(got.loss, want.loss)
    assert torch.equal(got.predicted_tokens, want.predicted_tokens)
