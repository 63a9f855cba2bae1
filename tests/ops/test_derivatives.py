"""Every differentiable op through every kind of derivative that torch has: the right value, or the sentence why not.

An op is a row of OPS beside plain torch that means the same, a kind of derivative is a row of TRANSFORMS. What is not supported has its
sentence in REFUSED; a public name that is in none of the tables fails the last test.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

import foveate

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, of forward mode


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


class Op(NamedTuple):
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]  # all of them differentiable


def visible(Sq: int, Skv: int) -> Tensor:
    return torch.arange(Skv) <= torch.arange(Sq)[:, None] + Skv - Sq


def attention(q, k, v, scale=None, softcap=None, bias=0.0, lse=False, sinks=None, causal=True):
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale.reshape(-1, 1, 1))
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s + bias
    if causal:
        s = s.masked_fill(~visible(*s.shape[-2:]), float("-inf"))
    if lse:
        return s.logsumexp(-1)
    if sinks is not None:
        sinks = sinks[:, None, None].expand(s.shape[0], -1, s.shape[2], 1)
        return torch.einsum("bhij,bjhd->bihd", torch.cat([s, sinks], -1).softmax(-1)[..., :-1], v)
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)


def relative_bias(table):
    return foveate.RelativeBias(table, max_distance=8).materialize(2, 3)


def packed(q, k, v):
    parts = [attention(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in ((0, 1), (1, 3))]
    return torch.cat(parts)


def rotary(q, k):
    def turn(x):
        z = torch.complex(x[..., :2], x[..., 2:]) * torch.complex(COS, SIN)[:, None]
        return torch.cat([z.real, z.imag], -1)

    return torch.cat([turn(q), turn(k)], 2)


def merged(a, la, b, lb):
    lse = torch.logaddexp(la, lb)
    return (la - lse).exp().mT[..., None] * a + (lb - lse).exp().mT[..., None] * b


COS, SIN = randn(3, 2), randn(3, 2)
WEIGHTS = torch.rand(5, dtype=D) + 0.5
TARGET, CU = torch.tensor([1, -100, 3]), torch.tensor([0, 1, 3])
QKV = lambda: (randn(1, 2, 2, 4), randn(1, 3, 1, 4), randn(1, 3, 1, 3))  # noqa: E731
LINEAR = lambda: (randn(3, 4), randn(5, 4), randn(5))  # noqa: E731
MHA, TORCH_MHA = foveate.nn.MultiheadAttention(8, 2, dtype=D), torch.nn.MultiheadAttention(8, 2, dtype=D)
TORCH_MHA.load_state_dict(MHA.state_dict())
A, CE = foveate.attention, foveate.cross_entropy


def lce(**options):
    return lambda h, w, b: foveate.linear_cross_entropy(h, w, TARGET, bias=b, **options)


def torch_lce(**options):
    return lambda h, w, b: F.cross_entropy(F.linear(h, w, b), TARGET, **options)


def smoothed(x, smoothing, z_loss, softcap):
    x = softcap * torch.tanh(x / softcap)
    lse, used = x.logsumexp(-1), TARGET >= 0
    loss = (
        lse
        - (1 - smoothing) * x.gather(-1, TARGET.clamp(min=0)[:, None])[:, 0]
        - smoothing * x.mean(-1)
        + z_loss * lse**2
    )
    return loss[used].sum() / used.sum()


OPS = {
    "attention": Op(lambda q, k, v: A(q, k, v, causal=True), attention, QKV),
    "attention, lse": Op(
        lambda q, k: A(q, k, k, causal=True, return_lse=True)[1],
        lambda q, k: attention(q, k, k, lse=True),
        lambda: QKV()[:2],
    ),
    "attention, sinks": Op(
        lambda q, k, v, s: A(q, k, v, causal=True, sinks=s),
        lambda q, k, v, s: attention(q, k, v, sinks=s),
        lambda: (*QKV(), randn(2)),
    ),
    "attention, bias": Op(
        lambda q, k, v, b: A(q, k, v, bias=b),
        lambda q, k, v, b: attention(q, k, v, bias=b, causal=False),
        lambda: (*QKV(), randn(1, 2, 1, 3)),
    ),
    "attention, T5 table": Op(
        lambda q, k, v, t: A(q, k, v, relative_bias=foveate.RelativeBias(t, max_distance=8)),
        lambda q, k, v, t: attention(q, k, v, bias=relative_bias(t), causal=False),
        lambda: (*QKV(), randn(8, 2)),
    ),
    "attention, learned scale": Op(
        lambda q, k, v, s: A(q, k, v, causal=True, scale=s), attention, lambda: (*QKV(), torch.rand((), dtype=D))
    ),
    "attention, a learned scale for each head": Op(
        lambda q, k, v, s: A(q, k, v, causal=True, scale=s), attention, lambda: (*QKV(), torch.rand(2, dtype=D))
    ),
    "attention, learned softcap": Op(
        lambda q, k, v, c: A(q, k, v, causal=True, softcap=c),
        lambda q, k, v, c: attention(q, k, v, softcap=c),
        lambda: (*QKV(), torch.rand((), dtype=D) + 0.5),
    ),
    "attention_varlen": Op(
        lambda q, k, v: foveate.attention_varlen(q, k, v, CU, CU, 2, 2, causal=True),
        packed,
        lambda: (randn(3, 2, 4), randn(3, 1, 4), randn(3, 1, 3)),
    ),
    "attention_weights": Op(
        lambda q, k: foveate.attention_weights(q, k, rows=[1, 0], heads=[1], causal=True),
        lambda q, k: attention(q, k, torch.eye(3, dtype=D)[None, :, None])[:, [1, 0], 1:].transpose(1, 2),
        lambda: QKV()[:2],
    ),
    "sdpa": Op(foveate.sdpa, F.scaled_dot_product_attention, lambda: (randn(2, 3, 4), randn(2, 3, 4), randn(2, 3, 4))),
    "merge_attention": Op(
        lambda *x: foveate.merge_attention(*x)[0],
        merged,
        lambda: (randn(1, 2, 2, 3), randn(1, 2, 2), randn(1, 2, 2, 3), randn(1, 2, 2)),
    ),
    "softmax": Op(lambda x: foveate.softmax(x, 0), lambda x: x.softmax(0), lambda: (randn(3, 4),)),
    "softmax, bias": Op(
        lambda x, b: foveate.softmax(x, bias=b, causal=True, scale=0.7),
        lambda x, b: (0.7 * x + b).masked_fill(~visible(3, 4), float("-inf")).softmax(-1),
        lambda: (randn(3, 4), randn(4)),
    ),
    "softmax, learned scale": Op(
        lambda x, s: foveate.softmax(x, scale=s),
        lambda x, s: (x * s).softmax(-1),
        lambda: (randn(3, 4), torch.rand((), dtype=D)),
    ),
    "log_softmax": Op(foveate.log_softmax, lambda x: x.log_softmax(-1), lambda: (randn(3, 4),)),
    "cross_entropy": Op(lambda x: CE(x, TARGET), lambda x: F.cross_entropy(x, TARGET), lambda: (randn(3, 5),)),
    "cross_entropy, none": Op(
        lambda x: CE(x, TARGET, reduction="none", label_smoothing=0.2),
        lambda x: F.cross_entropy(x, TARGET, reduction="none", label_smoothing=0.2),
        lambda: (randn(3, 5),),
    ),
    "cross_entropy, learned": Op(
        lambda x, a, b, c: CE(x, TARGET, label_smoothing=a, z_loss=b, softcap=c),
        smoothed,
        lambda: (randn(3, 5), *(torch.rand(3, dtype=D) + 0.1).unbind()),
    ),
    "linear_cross_entropy": Op(lce(), torch_lce(), LINEAR),
    "linear_cross_entropy, sum": Op(lce(reduction="sum"), torch_lce(reduction="sum"), LINEAR),
    "linear_cross_entropy, none": Op(lce(reduction="none"), torch_lce(reduction="none"), LINEAR),
    "rms_norm": Op(
        lambda x, w: foveate.rms_norm(x, w, 1e-2),
        lambda x, w: F.rms_norm(x, (4,), w, 1e-2),
        lambda: (randn(3, 4), randn(4)),
    ),
    "rms_norm, offset and residual": Op(
        lambda x, w, r: torch.cat(foveate.rms_norm(x, w, 1e-2, offset=1.0, residual=r)),
        lambda x, w, r: torch.cat([F.rms_norm(x + r, (4,), w + 1, 1e-2), x + r]),
        lambda: (randn(3, 4), randn(4), randn(3, 4)),
    ),
    "cross_entropy, weight": Op(
        lambda x: CE(x, TARGET, weight=WEIGHTS), lambda x: F.cross_entropy(x, TARGET, WEIGHTS), lambda: (randn(3, 5),)
    ),
    "swiglu": Op(foveate.swiglu, lambda a, b: F.silu(a) * b, lambda: (randn(3, 4), randn(3, 4))),
    "geglu": Op(foveate.geglu, lambda a, b: F.gelu(a, approximate="tanh") * b, lambda: (randn(3, 4), randn(3, 4))),
    "apply_rotary": Op(
        lambda q, k: torch.cat(foveate.apply_rotary(q, k, COS, SIN), 2),
        rotary,
        lambda: (randn(1, 3, 2, 4), randn(1, 3, 1, 4)),
    ),
    "nn.MultiheadAttention": Op(
        lambda x, y: MHA(x, y, y, need_weights=False)[0],
        lambda x, y: TORCH_MHA(x, y, y)[0],
        lambda: (randn(2, 1, 8), randn(3, 1, 8)),
    ),
}

# ---- kinds of derivatives: f with several tensors -> tensors that f and its definition must agree in -------------------------


def scalar(f):
    return lambda *xs: f(*xs).pow(2).sum()


def every(xs):
    return tuple(range(len(xs)))


def by_dual_tensors(f, xs):
    with fw.dual_level():
        tangent = fw.unpack_dual(f(*(fw.make_dual(x, x.flip(0).cos()) for x in xs))).tangent
    assert tangent is not None, "the tangent is gone"
    return tangent


def under_no_grad(f, xs):
    with torch.no_grad():
        return by_dual_tensors(f, xs)


def backward(f, xs):
    xs = [x.clone().requires_grad_() for x in xs]
    return torch.autograd.grad(scalar(f)(*xs), xs, materialize_grads=True)


def gradient_penalty(f, xs):
    """loss + |d loss / d x|^2: what is missing of the second derivative is seen as a wrong number, not as an error of torch."""
    xs = [x.clone().requires_grad_() for x in xs]
    loss = scalar(f)(*xs)
    grads = torch.autograd.grad(loss, xs, create_graph=True, materialize_grads=True)
    return torch.autograd.grad(loss + sum(g.pow(2).sum() for g in grads), xs, materialize_grads=True)


def third(f, xs):
    x = xs[0].clone().requires_grad_()
    g = scalar(f)(x, *xs[1:])
    for _ in range(2):
        (g,) = torch.autograd.grad(g, x, create_graph=True)
        g = g.pow(2).sum()
    return torch.autograd.grad(g, x)


def batched_cotangents(f, xs):
    xs = [x.clone().requires_grad_() for x in xs]
    out = f(*xs)
    seeds = torch.stack([torch.ones_like(out), out.detach()])
    return torch.autograd.grad(out, xs, seeds, is_grads_batched=True, materialize_grads=True)


def many(xs):
    return tuple(torch.stack([x, x.sin(), -x.abs()]) for x in xs)


def with_hooks(f, xs):
    """A saved tensor that a hook keeps is what it was after the backward pass."""
    kept: list[tuple[Tensor, Tensor]] = []

    def pack(t):
        kept.append((t, t.detach().clone()))
        return t

    xs = [x.clone().requires_grad_() for x in xs]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = 3 * scalar(f)(*xs)
    grads = torch.autograd.grad(loss, xs, materialize_grads=True)
    assert all(torch.equal(t, before) for t, before in kept), "the backward pass wrote to a saved tensor"
    return grads


func = torch.func
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "backward": backward,
    "backward, saved-tensor hooks": with_hooks,
    "backward, batched": batched_cotangents,
    "gradient penalty": gradient_penalty,
    "third derivative": third,
    "dual tensors": by_dual_tensors,
    "dual tensors under no_grad": under_no_grad,
    "jvp": lambda f, xs: func.jvp(f, xs, tuple(x.flip(0).cos() for x in xs))[1],
    "jacfwd": lambda f, xs: func.jacfwd(f, every(xs))(*xs),
    "grad": lambda f, xs: func.grad(scalar(f), every(xs))(*xs),
    "vjp": lambda f, xs: func.vjp(f, *xs)[1](f(*xs)),
    "jacrev": lambda f, xs: func.jacrev(f, every(xs))(*xs),
    "hessian": lambda f, xs: func.hessian(scalar(f))(*xs),
    "jacrev of jacrev": lambda f, xs: func.jacrev(func.jacrev(scalar(f)))(*xs),
    "jvp of grad": lambda f, xs: func.jvp(lambda x: func.grad(scalar(f))(x, *xs[1:]), xs[:1], (xs[0].cos(),))[1],
    "grad of jvp": lambda f, xs: func.grad(lambda x: func.jvp(scalar(f), (x, *xs[1:]), tuple(y.cos() for y in xs))[1])(
        xs[0]
    ),
    "backward of grad": lambda f, xs: backward(lambda x: func.grad(scalar(f))(x, *xs[1:]), xs[:1]),
    "vmap": lambda f, xs: torch.vmap(f)(*many(xs)),
    "vmap of one": lambda f, xs: torch.vmap(f, (0, *[None] * (len(xs) - 1)))(many(xs)[0], *xs[1:]),
    "vmap of vmap": lambda f, xs: torch.vmap(torch.vmap(f))(*many(many(xs))),
    "vmap of grad": lambda f, xs: torch.vmap(func.grad(scalar(f), every(xs)))(*many(xs)),
    "vmap of grad, parameters shared": lambda f, xs: torch.vmap(
        func.grad(scalar(f), every(xs)), (0, *[None] * (len(xs) - 1))
    )(many(xs)[0], *xs[1:]),
    "backward of vmap": lambda f, xs: backward(torch.vmap(f), many(xs)),
    "backward of vmap, parameters shared": lambda f, xs: backward(
        torch.vmap(f, (0, *[None] * (len(xs) - 1))), (many(xs)[0], *xs[1:])
    ),
    "grad of vmap": lambda f, xs: func.grad(scalar(torch.vmap(f)), every(xs))(*many(xs)),
    "jvp of vmap": lambda f, xs: func.jvp(torch.vmap(f), many(xs), tuple(x.cos() for x in many(xs)))[1],
    "vmap of jvp": lambda f, xs: torch.vmap(lambda *xs: func.jvp(f, xs, xs)[1])(*many(xs)),
    "vmap of hessian": lambda f, xs: torch.vmap(func.hessian(scalar(f)))(*many(xs)),
}

ONCE = "pass reduction='none' and reduce the losses"
SECOND = ("gradient penalty", "third derivative", "jacrev of jacrev", "backward of grad")
REFUSED = dict.fromkeys(
    itertools.product(("linear_cross_entropy", "linear_cross_entropy, sum"), SECOND), (NotImplementedError, ONCE)
)


def flat(x: Any) -> list[Tensor]:
    return list(torch.utils._pytree.tree_leaves(x))


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_derivative(name, kind):
    op, transform = OPS[name], TRANSFORMS[kind]
    xs = op.inputs()
    if (name, kind) in REFUSED:
        error, sentence = REFUSED[name, kind]
        with pytest.raises(error, match=re.escape(sentence)):
            transform(op.ours, xs)
        return
    found, expected = flat(transform(op.ours, xs)), flat(transform(op.theirs, xs))
    assert len(found) == len(expected) > 0
    assert any(t.any() for t in expected), "the definition's result is zero, so this says nothing"
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


# ---- what has no derivative says so, on every way ---------------------------------------------------------------------------------

CACHE = torch.randn(1, 6, 2, 8)
PACKED = foveate.nn.PackedLinear.from_linear(torch.nn.Linear(4, 3))


def cached(q):
    return foveate.attention_with_kv_cache(q, CACHE, CACHE, kv_lens=torch.tensor([4]))


@pytest.mark.parametrize("kind", [k for k in TRANSFORMS if k not in ("vmap", "vmap of one", "vmap of vmap")])
@pytest.mark.parametrize("what", ["cached attention", "rotary tables", "ALiBi slopes"])
def test_no_derivative_is_dropped(what, kind):
    q = torch.randn(1, 3, 2, 8)
    f, x = {
        "cached attention": (cached, q),
        "rotary tables": (lambda cos: foveate.apply_rotary(q, q, cos, torch.ones(3, 4))[0], torch.randn(3, 4)),
        "ALiBi slopes": (lambda slopes: A(q, q, q, alibi_slopes=slopes), torch.rand(2)),
    }[what]
    if what == "rotary tables" and any(word in kind for word in ("dual", "jvp", "jacfwd", "hessian")):
        return  # forward mode is plain torch, where tables are tensors like any other
    with pytest.raises(ValueError, match="gradient"):
        TRANSFORMS[kind](f, (x,))


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_packed_linear(kind):
    weight = PACKED.dequantize()
    found, expected = (
        flat(TRANSFORMS[kind](f, (x,)))
        for x in [torch.randn(2, 4)]
        for f in (PACKED, lambda x: F.linear(x, weight, PACKED.bias))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_bias_of_packed_linear_that_requires_a_gradient_is_refused():
    with pytest.raises(ValueError, match="bias requires a gradient"):
        foveate.ops.packed_linear.packed_linear(
            torch.randn(2, 4), PACKED.data, "f32", 3, torch.zeros(3, requires_grad=True)
        )


# ---- what autograd has saved and an op writes to, or reads twice -----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_appending_to_a_cache_is_seen_by_autograd(backend):
    if foveate.backends()[backend] is not None:
        pytest.skip(f"{backend}: {foveate.backends()[backend]}")
    k_cache, v_cache, new = torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 2, 2, 8)
    w = torch.ones(8, requires_grad=True)
    losses = [(cache * w).sum() for cache in (k_cache, v_cache)]
    with torch.no_grad():
        foveate.attention_with_kv_cache(new, k_cache, v_cache, k=new, v=new, kv_lens=torch.tensor([3]), backend=backend)
    for loss in losses:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_appending_to_an_expanded_cache_is_refused():
    caches, new, lens = torch.zeros(1, 6, 2, 8).expand(2, 6, 2, 8), torch.randn(2, 1, 2, 8), torch.tensor([3, 3])
    own = torch.zeros(2, 6, 2, 8)
    for k_cache, v_cache, name in ((caches, own, "k_cache"), (own, caches, "v_cache")):
        with pytest.raises(ValueError, match=f"{name} of shape .* is expanded in dimension 0"):
            foveate.attention_with_kv_cache(new, k_cache, v_cache, k=new, v=new, kv_lens=lens)
    foveate.attention_with_kv_cache(new, caches, caches, kv_lens=lens)  # to read it is no harm


def test_vmap_of_a_cache_writes_to_each_slice():
    caches, new, lens = torch.zeros(3, 2, 1, 6, 2, 8), torch.randn(3, 1, 2, 2, 8), torch.tensor([[0], [2], [4]])
    expected = caches.clone()

    def append(cache, new, lens):
        return foveate.attention_with_kv_cache(new, cache[0], cache[1], k=new, v=new, kv_lens=lens)

    out = torch.vmap(append)(caches, new, lens)
    for i in range(3):
        torch.testing.assert_close(out[i], append(expected[i], new[i], lens[i]))
    assert torch.equal(caches, expected) and caches.any()
    with pytest.raises(ValueError, match="write every slice's new keys to the same cache"):
        torch.vmap(append, (None, 0, 0))(caches[0], new, lens)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_of_linear_cross_entropy_are_unpacked_once(reduction):
    """What torch.utils.checkpoint computes again may be taken once."""
    h, w, _ = (x.requires_grad_() for x in LINEAR())

    def f(h):
        return foveate.linear_cross_entropy(h * 2, w, TARGET, reduction=reduction).sum()

    expected = torch.autograd.grad(f(h), (h, w))
    found = torch.autograd.grad(torch.utils.checkpoint.checkpoint(f, h, use_reentrant=False), (h, w))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("op", ["rms_norm", "softmax", "attention"])
def test_transforms_inside_torch_compile(op):
    """Once a gradient of zero, as an autograd.Function is traced there for its forward pass alone."""
    f, x = {
        "rms_norm": (lambda x: foveate.rms_norm(x, None, 1e-2).pow(3).sum(), torch.randn(2, 4)),
        "softmax": (lambda x: foveate.softmax(x).pow(2).sum(), torch.randn(2, 4)),
        "attention": (lambda x: A(x, x, x, causal=True).pow(2).sum(), torch.randn(1, 3, 2, 4)),
    }[op]
    y = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(y), y)
    compiled = torch.compile(func.grad(f), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


# Public names that compute nothing, or nothing that a derivative could go through.
OTHERS = {
    "attention_with_kv_cache",  # tested above
    "ring_attention",  # needs processes: tests/ops/test_ring_attention.py
    "nn",  # its modules are OPS and PackedLinear
    *(
        "CacheFull",
        "CacheView",
        "CheckpointError",
        "CrossEntropyOutput",
        "PagedKVCache",
        "RelativeBias",
        "UnsupportedError",
        "backends",
        "drop_in",
        "explain",
        "info",
    ),
}


def test_every_public_op_is_in_the_tables():
    models = {name for name in foveate._LAZY if name != "ring_attention"}
    ops = {name.split(",")[0] for name in OPS}
    missing = set(foveate.__all__) - models - OTHERS - ops - {"SamplingParams"}
    assert not missing, f"no row of OPS for {missing}: give the op and what it means in plain torch"
