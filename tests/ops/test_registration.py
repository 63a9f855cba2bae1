"""The ops behind foveate.attention as torch sees them: opcheck, fake and meta tensors, vmap, grad, autocast, gradcheck."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import foveate
from foveate.backend import native, registry
from foveate.ops.attention.operands import Operands

forward_op = torch.ops.foveate.attention_forward.default
backward_op = torch.ops.foveate.attention_backward.default


def qkv(B=2, Sq=5, Skv=7, Hq=4, Hkv=2, D=8, Dv=6, dtype=torch.float32, requires_grad=False):
    shapes = (B, Sq, Hq, D), (B, Skv, Hkv, D), (B, Skv, Hkv, Dv)
    return [torch.randn(shape, dtype=dtype, requires_grad=requires_grad) for shape in shapes]


def dense_operands(backend):
    q, k, v = qkv()
    return Operands(
        q=q, k=k, v=v, bias=torch.randn(1, 4, 5, 7), mask=torch.rand(2, 1, 1, 7) > 0.3, alibi=torch.rand(1, 4),
        rel_table=torch.randn(8, 4), sinks=torch.randn(4), kv_lens=torch.tensor([7, 4], dtype=torch.int32), cu_q=None,
        cu_k=None, philox=torch.tensor([3, 4]), max_q=5, max_k=7, causal=True, window_left=4, window_right=-1, scale=0.3,
        softcap=2.0, rel_bidirectional=False, rel_max_distance=16, dropout_p=0.25, deterministic=False,
        backend=backend,
    )  # fmt: skip


def plain_operands(backend):
    q, k, v = qkv()
    nothing = dict.fromkeys(("bias", "mask", "alibi", "rel_table", "sinks", "kv_lens", "cu_q", "cu_k", "philox"))
    return dense_operands(backend)._replace(q=q, k=k, v=v, **nothing, window_left=-1, softcap=0.0, dropout_p=0.0)


def packed_operands(backend):
    q, k, v = (x.flatten(0, 1) for x in qkv())
    return plain_operands(backend)._replace(
        q=q, k=k, v=v, cu_q=torch.tensor([0, 4, 4, 10], dtype=torch.int32),
        cu_k=torch.tensor([0, 6, 9, 14], dtype=torch.int32), max_q=6, max_k=6,
    )  # fmt: skip


OPERANDS = [dense_operands, plain_operands, packed_operands]


@pytest.mark.parametrize("make", OPERANDS)
def test_opcheck_forward(make, backend):
    opcheck(forward_op, tuple(make(backend)))


@pytest.mark.parametrize("make", OPERANDS)
@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck_backward(make, with_dlse, backend):
    c = make(backend)
    out, lse = forward_op(*c)
    wanted = [True, False, True, c.bias is not None, c.rel_table is not None, c.sinks is not None]
    dlse = torch.randn_like(lse) if with_dlse else None
    opcheck(backward_op, (torch.randn_like(out), dlse, out, lse, *c, wanted))


def test_outputs_are_contiguous_whatever_the_inputs_are(backend):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv())
    out, lse = foveate.attention(q, k, v, return_lse=True, backend=backend)
    assert out.is_contiguous() and lse.is_contiguous()
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert q.stride(-1) != 1
    torch.testing.assert_close(foveate.attention(q, k, v, backend=backend), out)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_shapes_without_memory(kind):
    real = qkv()
    expected = foveate.attention(*real, causal=True, return_lse=True)
    if kind == "meta":
        results = foveate.attention(*(x.to("meta") for x in real), causal=True, return_lse=True)
    else:
        with FakeTensorMode() as mode:
            results = foveate.attention(*(mode.from_tensor(x) for x in real), causal=True, return_lse=True)
    for result, real_one in zip(results, expected):
        assert (result.shape, result.stride(), result.dtype) == (real_one.shape, real_one.stride(), real_one.dtype)


def test_gradients_of_meta_tensors_have_shapes():
    q, k, v = (x.to("meta").requires_grad_() for x in qkv())
    foveate.attention(q, k, v).sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]


@pytest.mark.skipif(native.missing_reason is not None, reason="no compiled module")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # torch's own, once in a process
@pytest.mark.parametrize("exchange", [True, False])
def test_both_ways_to_take_tensors(exchange):
    """The DLPack exchange table and the attribute fallback give the same bits, and both refuse tensors without memory."""
    if exchange and not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip(f"torch {torch.__version__} has no DLPack C exchange API; it came with torch 2.10")
    q, k, v = qkv(dtype=torch.bfloat16)
    expected = foveate.attention(q, k, v, backend="native")
    before = native._C.uses_dlpack_exchange()
    native._C.set_dlpack_exchange(exchange)
    try:
        assert native._C.uses_dlpack_exchange() == exchange
        assert torch.equal(foveate.attention(q, k, v, backend="native"), expected)
        c, out = plain_operands("native"), expected.clone()
        with FakeTensorMode() as mode:
            fake = c._replace(q=mode.from_tensor(c.q), k=mode.from_tensor(c.k), v=mode.from_tensor(c.v))
            with pytest.raises(TypeError, match=r"has no memory \(a fake, meta or lazy tensor\)|FakeTensor"):
                native._C.attention_forward(fake, None, out, None, (1, 0, 1, 1, True), 1)
    finally:
        native._C.set_dlpack_exchange(before)


def test_gradcheck(backend):
    q, k, v = qkv(B=1, Sq=3, Skv=4, Hq=2, Hkv=1, D=4, Dv=3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def f(q, k, v, bias, table, sinks):
        relative = foveate.RelativeBias(table, max_distance=8)
        return foveate.attention(
            q, k, v, causal=True, softcap=2.0, bias=bias, relative_bias=relative, sinks=sinks, return_lse=True,
            backend=backend,
        )  # fmt: skip

    assert torch.autograd.gradcheck(f, (q, k, v, bias, table, sinks))


def test_gradient_of_lse_alone(backend):
    q, k, v = qkv(requires_grad=True)
    _, lse = foveate.attention(q, k, v, return_lse=True, backend=backend)
    lse.sum().backward()
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5
    torch.testing.assert_close(q.grad, torch.autograd.grad(torch.logsumexp(s, -1).sum(), q)[0])
    assert not v.grad.any()


def test_only_what_requires_gradients_gets_them(backend):
    q, k, v = qkv()
    v.requires_grad_()
    foveate.attention(q, k, v, backend=backend).sum().backward()
    assert q.grad is None and v.grad.shape == v.shape


def test_functional_grad_is_backward(backend):
    q, k, v = qkv(requires_grad=True)

    def f(q, k, v):
        return foveate.attention(q, k, v, causal=True, backend=backend).square().sum()

    found = torch.func.grad(f, argnums=(0, 1, 2))(*(x.detach() for x in (q, k, v)))
    f(q, k, v).backward()
    for grad, x in zip(found, (q, k, v)):
        torch.testing.assert_close(grad, x.grad)


def slices(f, in_dims, *xs):
    """What vmap means."""
    size = next(x.shape[dim] for x, dim in zip(xs, in_dims) if dim is not None)
    pick = [[x if dim is None else x.select(dim, i) for x, dim in zip(xs, in_dims)] for i in range(size)]
    return torch.stack([f(*x) for x in pick])


VMAP = {
    "all": ((0, 0, 0, 0, 0), {}),
    "dims": ((2, 1, 4, 0, None), {}),
    "q alone": ((0, None, None, None, None), {}),
    "mask and lengths": ((None, None, None, 0, 0), {}),
    "sinks shared": ((0, 0, 0, None, None), {"sinks": torch.randn(4), "alibi_slopes": torch.rand(2, 4)}),
}


@pytest.mark.filterwarnings("error:.*performance drop.*")
@pytest.mark.parametrize("name", VMAP)
def test_vmap(name, backend):
    in_dims, options = VMAP[name]
    xs = [*qkv(), torch.rand(1, 5, 7) > 0.2, torch.tensor([7, 3])]
    xs = [x if dim is None else torch.stack([x, x.roll(1), x.flip(0)], dim) for x, dim in zip(xs, in_dims)]

    def f(q, k, v, mask, kv_lens):
        return foveate.attention(q, k, v, mask=mask, kv_lens=kv_lens, causal=True, backend=backend, **options)

    torch.testing.assert_close(torch.vmap(f, in_dims)(*xs), slices(f, in_dims, *xs))


@pytest.mark.filterwarnings("error:.*performance drop.*")
@pytest.mark.parametrize("shared", ["bias", "batch bias", "sinks", "table", "mapped sinks"])
def test_vmap_of_grad(shared, backend):
    """Gradients of what the slices share are still one for each slice."""
    q, k, v = qkv()
    x = {"bias": (1, 4, 5, 7), "batch bias": (2, 1, 5, 1), "table": (8, 4)}.get(shared, (4,))
    x, q = torch.randn(x), torch.randn(3, *q.shape)
    in_dims = (0 if shared == "mapped sinks" else None, 0)
    if shared == "mapped sinks":
        x = torch.randn(3, 4)

    def f(x, q):
        option = {"bias": x} if "bias" in shared else {"sinks": x}
        if shared == "table":
            option = {"relative_bias": foveate.RelativeBias(x, max_distance=16)}
        return foveate.attention(q, k, v, backend=backend, **option).square().sum()

    for argnum in (0, 1):
        grad = torch.func.grad(f, argnums=argnum)
        torch.testing.assert_close(torch.vmap(grad, in_dims)(x, q), slices(grad, in_dims, x, q))


def test_vmap_of_packed_and_of_dropout(backend):
    q, k, v = (x.flatten(0, 1) for x in qkv())
    qs = torch.stack([q, q.flip(0)])
    cu_q, cu_k = torch.tensor([0, 4, 10]), torch.tensor([0, 9, 14])

    def packed(q):
        return foveate.attention_varlen(q, k, v, cu_q, cu_k, 6, 9, backend=backend)

    torch.testing.assert_close(torch.vmap(packed)(qs), slices(packed, (0,), qs))

    def dropped(q):
        generator = torch.Generator().manual_seed(5)
        return foveate.attention(q, *qkv_fixed, dropout_p=0.5, generator=generator, backend=backend)

    q, *qkv_fixed = qkv()
    qs = torch.stack([q, q.flip(0)])
    torch.testing.assert_close(torch.vmap(dropped, randomness="same")(qs), slices(dropped, (0,), qs))
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(dropped)(qs)
    q3 = torch.stack([qs[0]] * 2)
    different = torch.vmap(lambda q: foveate.attention(q, *qkv_fixed, dropout_p=0.5), randomness="different")(q3)
    assert not torch.equal(different[0], different[1])


def test_gradient_through_vmap(backend):
    q, k, v = qkv(requires_grad=True)
    qs = torch.stack([q.detach(), q.detach().flip(0)]).requires_grad_()
    torch.vmap(lambda q: foveate.attention(q, k, v, backend=backend))(qs).square().sum().backward()
    found = [x.grad for x in (qs, k, v)]
    for x in (qs, k, v):
        x.grad = None
    slices(lambda q: foveate.attention(q, k, v, backend=backend), (0,), qs).square().sum().backward()
    for grad, x in zip(found, (qs, k, v)):
        torch.testing.assert_close(grad, x.grad)


def test_autocast(backend):
    q, k, v = qkv(requires_grad=True)
    expected = foveate.attention(*(x.detach().bfloat16() for x in (q, k, v)), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = foveate.attention(q, k.bfloat16(), v, backend=backend)
        doubles = foveate.attention(*(x.double() for x in (q, k, v)), backend=backend)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    assert doubles.dtype == torch.float64  # as torch's attention: fp64 is left alone
    out.float().sum().backward()
    assert q.grad.dtype == torch.float32 and q.grad.abs().sum() > 0


def test_profiler_sees_the_op():
    q, k, v = qkv()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        foveate.attention(q, k, v)
    assert "foveate::attention_forward" in {event.key for event in profile.key_averages()}


def test_negated_views_are_read_negated(backend):
    """imag of a conjugate is a view with the negative bit: its memory holds the opposite sign."""
    q, k, v = qkv()
    negated = torch.complex(torch.zeros_like(q), -q).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(foveate.attention(negated, k, v, backend=backend), foveate.attention(q, k, v))


def test_functions_in_dispatch_modes_and_tracers_take_the_long_way():
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        ops = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.ops += (func,)
            return func(*args, **(kwargs or {}))

    with Seen() as seen:
        foveate.attention(*qkv())
    assert forward_op in seen.ops
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda *x: foveate.attention(*x))(*qkv())
    assert forward_op in {node.target for node in traced.graph.nodes}


ROW_CALLS = {
    "softmax": lambda x, **o: foveate.softmax(x, **o),
    "log_softmax": lambda x, **o: foveate.log_softmax(x, **o),
    "rms_norm": lambda x, **o: foveate.rms_norm(x, None, 1e-5, **o),
    "glu": lambda x, **o: foveate.swiglu(x, x, **o),
    "apply_rotary": lambda x, **o: foveate.apply_rotary(x[None, None], x[None, None], x[:1, :4], x[:1, 4:], **o)[0],
    "cross_entropy": lambda x, **o: foveate.cross_entropy(x, torch.tensor([1, -100, 3]), **o),
    "linear_cross_entropy": lambda x, **o: foveate.linear_cross_entropy(x, x, torch.tensor([1, -100, 2]), **o),
}


@pytest.mark.parametrize("name", ROW_CALLS)
def test_the_backend_is_chosen_inside_the_op(name, monkeypatch):
    """So a graph holds the same op whoever computes it, and it decides when it runs: by the table, or by the name that it is given."""
    x, call = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), ROW_CALLS[name]
    op = getattr(torch.ops.foveate, name).default
    exact = call(x, backend="reference")
    results = {}
    for backend in (None, "reference"):
        graph = torch.fx.experimental.proxy_tensor.make_fx(functools.partial(call, backend=backend))(x)
        assert op in {node.target for node in graph.graph.nodes}
        results[backend] = graph
    torch.testing.assert_close(results["reference"](x), exact)
    torch.testing.assert_close(results[None](x), exact)
    asked = []
    registry.forget_choices()
    monkeypatch.setattr(registry, "why_not", lambda *query, real=registry.why_not: asked.append(query) or real(*query))
    results["reference"](x)
    assert {backend for _, backend, _ in asked} == {"reference"}
    registry.forget_choices()
    with pytest.raises(ValueError, match="backend='cudnn' is unknown"):
        call(x, backend="cudnn")


@pytest.mark.parametrize("name", [*ROW_CALLS, "attention_forward", "attention_with_kv_cache", "packed_linear"])
def test_devices_without_kernels_have_the_reference(name):
    """An op that torch has no implementation of for a device could not fall back to plain torch there."""
    for key in ("CPU", "CUDA", "XPU", "MPS", "PrivateUse1"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"foveate::{name}", key), key
