"""apply_rotary: values and gradients against torch in the same dtype, properties, bad input."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.backend.reference import rows as reference_rows
from op_compare import compare_op
from poison import guarded_outputs, nan_padded

pytestmark = [pytest.mark.kernels, pytest.mark.cuda]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def tables(seq: int, pairs: int, dtype: torch.dtype, batch: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (seq, pairs) if batch is None else (batch, seq, pairs)
    angles = torch.rand(shape, dtype=torch.float64) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def torch_rotary(x, cos, sin, interleaved):
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (128, 64), (72, 33), (6, 3), (2, 1), (320, 151), (8, 0)])
def test_values_and_gradients(dim, pairs, dtype, interleaved):
    q, k = torch.randn(2, 5, 4, dim).to(dtype), torch.randn(2, 5, 1, dim).to(dtype)
    for batch in (None, 2):
        cos, sin = tables(5, pairs, dtype, batch)

        def ours(q, k, cos=cos, sin=sin):
            return torch.cat(foveate.apply_rotary(q, k, cos, sin, interleaved=interleaved), 2)

        def peer(q, k, cos=cos, sin=sin):
            return torch.cat([torch_rotary(x, cos, sin, interleaved) for x in (q, k)], 2)

        compare_op(ours, peer, q, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_tables(dtype):
    q, k = torch.randn(1, 3, 2, 64).to(dtype), torch.randn(1, 3, 2, 64).to(dtype)
    cos, sin = tables(3, 32, torch.float32)
    for mine, exact in zip(foveate.apply_rotary(q, k, cos, sin), reference_rows.apply_rotary(q, k, cos, sin)):
        assert torch.equal(mine, exact)


def test_strides():
    big = torch.randn(2, 4, 5, 96)
    cos, sin = tables(5, 24, torch.float32, 2)
    for q in (
        big.transpose(1, 2)[..., :48],
        big.transpose(1, 2)[..., ::2],
        big.movedim(-1, 0).contiguous().movedim(0, -1)[:, :4, :, :48].transpose(1, 2),
    ):
        for mine, packed in zip(
            foveate.apply_rotary(q, q, cos, sin), foveate.apply_rotary(q.contiguous(), q.contiguous(), cos, sin)
        ):
            assert mine.is_contiguous() and torch.equal(mine, packed)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (cos, sin)]
    q = big[..., :48].transpose(1, 2)
    assert torch.equal(foveate.apply_rotary(q, q, *turned)[0], foveate.apply_rotary(q, q, cos, sin)[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_and_relative_angles(interleaved):
    """A rotation keeps lengths, and the product of q at i with k at j depends on i - j alone."""
    angles = torch.arange(9, dtype=torch.float64)[:, None] * torch.rand(8, dtype=torch.float64)
    q, k = (torch.randn(1, 1, 1, 16, dtype=torch.float64).expand(1, 9, 1, 16) for _ in range(2))
    tq, tk = foveate.apply_rotary(q, k, angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(tq.norm(dim=-1), q.norm(dim=-1))
    products = tq[0, :, 0] @ tk[0, :, 0].T
    for distance in range(9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_every_element_is_written():
    q, k = torch.randn(2, 5, 3, 40), torch.randn(2, 5, 1, 40)
    cos, sin = tables(5, 17, torch.float32)
    for interleaved in (False, True):
        with guarded_outputs() as guard:
            out = foveate.apply_rotary(
                nan_padded(q), nan_padded(k), nan_padded(cos), nan_padded(sin), interleaved=interleaved
            )
        guard.check()
        for mine, exact in zip(out, reference_rows.apply_rotary(q, k, cos, sin, interleaved)):
            torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8)])
def test_empty(shape):
    q = torch.randn(shape, requires_grad=True)
    cos, sin = tables(shape[1], 4, torch.float32)
    sum(t.sum() for t in foveate.apply_rotary(q, q, cos, sin)).backward()
    assert q.grad.shape == shape


def test_gradcheck():
    q, k = (torch.randn(2, 3, h, 8, dtype=torch.float64, requires_grad=True) for h in (4, 1))
    cos, sin = tables(3, 3, torch.float64)
    for interleaved in (False, True):
        call = lambda q, k: foveate.apply_rotary(q, k, cos, sin, interleaved=interleaved)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, (q, k))


def test_compile_vmap_and_func_grad():
    q, k = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 5, 1, 8)
    cos, sin = tables(5, 3, torch.float32, 3)

    def loss(q, k, cos, sin):
        a, b = foveate.apply_rotary(q, k, cos, sin)
        return a.pow(3).sum() + b.pow(3).sum()

    leaves = [t[0].clone().requires_grad_() for t in (q, k)]
    eager = torch.autograd.grad(loss(*leaves, cos[0], sin[0]), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(eager, torch.autograd.grad(compiled(*leaves, cos[0], sin[0]), leaves)))
    for in_dims in ((0, 0, 0, 0), (0, None, None, None), (0, 0, 0, None)):
        args = [t if d == 0 else t[0] for t, d in zip((q, k, cos, sin), in_dims)]
        grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=in_dims)(*args)
        for i in range(3):
            one = [t[i] if d == 0 else t for t, d in zip(args, in_dims)]
            for mapped, single in zip(grads, torch.func.grad(loss, argnums=(0, 1))(*one)):
                torch.testing.assert_close(mapped[i], single)


def test_opcheck():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 1, 8)
    cos, sin = tables(5, 3, torch.float32)
    torch.library.opcheck(
        torch.ops.foveate.apply_rotary.default,
        (q, k.transpose(0, 1).contiguous().transpose(0, 1), cos, sin, True, False),
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_is_the_definition(interleaved):
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 1, 8)
    cos, sin = tables(5, 3, torch.float32)
    ours = foveate.apply_rotary(q, k, cos, sin, interleaved=interleaved, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(ours, reference_rows.apply_rotary(q, k, cos, sin, interleaved)))


Q, C = torch.zeros(2, 5, 4, 8), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: foveate.apply_rotary(Q[0], Q, C, C),
            ValueError,
            r"q must be \[B, S, Hq, D\] .* got \(5, 4, 8\) and \(2, 5, 4, 8\)",
        ),
        (lambda: foveate.apply_rotary(Q, Q[:, :4], C, C), ValueError, "with the same B, S and D"),
        (lambda: foveate.apply_rotary(Q, Q.half(), C, C), TypeError, "k is torch.float16 and q is torch.float32"),
        (lambda: foveate.apply_rotary(Q, Q, C[:4], C), ValueError, r"cos has shape \(4, 4\)"),
        (
            lambda: foveate.apply_rotary(Q, Q, C, torch.zeros(5, 5)),
            ValueError,
            r"sin has shape \(5, 5\); .* with rot up to 8",
        ),
        (lambda: foveate.apply_rotary(Q, Q, C, C[:, :2]), ValueError, r"cos and sin differ: \(5, 4\)"),
        (lambda: foveate.apply_rotary(Q, Q, C.half(), C), TypeError, "cos is torch.float16 and q is torch.float32"),
        (lambda: foveate.apply_rotary(Q, Q, C.clone().requires_grad_(), C), ValueError, "cos requires a gradient"),
        (lambda: foveate.apply_rotary(Q, Q, C, C.to("meta")), ValueError, "sin is on meta and q on cpu"),
        (
            lambda: foveate.apply_rotary(Q, Q, C, C, backend="triton"),
            foveate.UnsupportedError,
            "'triton' cannot serve apply_rotary",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
