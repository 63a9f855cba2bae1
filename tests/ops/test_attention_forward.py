"""Forward of foveate.attention against fp64: every option alone and combined, shapes, dtypes, memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import compare
import foveate
import poison
from cases import ATTENTION_CASES, BF16_CASES, EMPTY, AttentionCase, make_inputs, random_cases

pytestmark = [pytest.mark.amx, pytest.mark.kernels, pytest.mark.cuda, pytest.mark.interpreted]


def check_forward(case: AttentionCase, seed: int, backend: str, device: str = "cpu") -> None:
    check = "test_attention_forward.check_forward"
    compare.assert_case_as_good_as_torch(case, seed, backend, device, check, backward=False)


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.id)
def test_against_exact(case, backend, device, seed):
    check_forward(case, seed, backend, device)


@pytest.mark.gpu
@pytest.mark.interpreter_slow
@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.id)
def test_in_bf16(case, backend, device, seed):
    check_forward(case, seed, backend, device)


@pytest.mark.parametrize(
    "index", [*range(22), *(pytest.param(i, marks=pytest.mark.interpreter_slow) for i in range(22, 40))]
)
def test_random(index, backend, device, seed):
    case = random_cases(index + 1, seed)[index]
    check_forward(case, seed + index, backend, device)


@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.id)
def test_empty_tensors(case, backend, device, seed):
    inputs = make_inputs(case, seed, device)
    out, lse = inputs.run(backend)
    assert torch.equal(out, out.new_zeros(case.b, case.sq, case.hq, case.d))
    assert torch.equal(lse, lse.new_full((case.b, case.hq, case.sq), float("-inf")))


def test_lse_is_optional(backend, device, seed):
    inputs = make_inputs(AttentionCase(causal=True), seed, device)
    out, _ = foveate.attention(inputs.q, inputs.k, inputs.v, causal=True, return_lse=True, backend=backend)
    assert torch.equal(out, foveate.attention(inputs.q, inputs.k, inputs.v, causal=True, backend=backend))


POISONED = [
    AttentionCase(b=3, sq=20, skv=150, hkv=2, kv_lens=True, causal=True),
    AttentionCase(b=3, sq=1, skv=300, hq=8, hkv=2, d=64, kv_lens=True),
    AttentionCase(b=3, sq=70, skv=70, kv_lens=True, bias="bhqk", mask="b11k", d=40, dv=24),
    AttentionCase(
        b=3, sq=33, skv=65, kv_lens=True, sinks=True, relative="bidirectional", alibi="h", dtype=torch.bfloat16
    ),
]


@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.id)
def test_nothing_outside_is_read_or_written(case, backend, device, seed):
    """NaN beyond kv_lens and in the padding between rows, heads and elements; canaries around NaN-filled outputs."""
    inputs = make_inputs(case, seed, device)
    clean = inputs.run(backend)
    dirty = inputs.replace(
        q=poison.nan_padded(inputs.q),
        k=poison.nan_padded(poison.nan_beyond(inputs.k, inputs.kv_lens)),
        v=poison.nan_padded(poison.nan_beyond(inputs.v, inputs.kv_lens)),
    )
    if case.bias:
        bias = inputs.bias.clone()
        for b, length in enumerate(inputs.kv_lens.tolist()):
            bias[b, :, :, length:] = float("nan")
        dirty = dirty.replace(bias=poison.nan_padded(bias))
    with poison.guarded_outputs() as guard:
        poisoned = dirty.run(backend)
    assert guard.buffers or backend == "reference", "no output was allocated through torch.empty, so none was guarded"
    for name, before, after in zip(("out", "lse"), clean, poisoned):
        assert torch.equal(before, after), f"{name} depends on memory that the call must not read"


def test_inputs_are_not_modified(backend, device, seed):
    case = AttentionCase(
        b=3, hkv=2, causal=True, bias="bhqk", sinks=True, kv_lens=True, relative="bidirectional", softcap=2.0
    )
    inputs = make_inputs(case, seed, device)
    before = {name: x.clone() for name, x in inputs.leaves.items()}
    inputs.run(backend)
    for name, x in inputs.leaves.items():
        assert torch.equal(x, before[name]), f"{name} was modified"


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_strides(tensor, backend, device, seed):
    """Batch stride 0, other dim orders, and a last dimension that is not contiguous, which is copied."""
    inputs = make_inputs(AttentionCase(sq=40, skv=40, hkv=2, d=48), seed, device)
    x = getattr(inputs, tensor)
    dense = x[:1].expand_as(x).contiguous()
    strided = {
        "expanded": (dense, x[:1].expand_as(x)),
        "head-major": (x, x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)),
        "last dim strided": (x, x.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)),
    }
    for name, (plain, view) in strided.items():
        assert torch.equal(plain, view)
        a, b = (inputs.replace(**{tensor: t}) for t in (plain, view))
        outs = [foveate.attention(i.q, i.k, i.v, causal=True, backend=backend) for i in (a, b)]
        assert torch.equal(*outs), f"{tensor} {name}: the result depends on the strides"


@pytest.mark.interpreter_slow
def test_offsets_beyond_32_bits(backend, device, seed):
    """Keys 2**30 elements apart: four of them span more than 2**31. Only the pages in use are ever committed."""
    step = 2**30
    d, generator = 16, torch.Generator().manual_seed(seed)
    memory = torch.empty(3 * step + d, dtype=torch.bfloat16, device=device)
    far = memory.as_strided((1, 4, 1, d), (d, step, d, 1))
    near = torch.randn(1, 4, 1, d, generator=generator).to(memory)
    far.copy_(near)
    q = torch.randn(1, 3, 2, d, generator=generator).to(memory)
    assert torch.equal(
        foveate.attention(q, far, far, backend=backend), foveate.attention(q, near, near, backend=backend)
    )


def test_large_scores_do_not_overflow(backend, device):
    """Scores near 1e4: exp needs the row's maximum, also when it arrives in a late block of keys."""
    q = torch.full((1, 2, 1, 16), 50.0, device=device)
    k = torch.linspace(-20, 20, 700, device=device)[None, :, None, None].expand(1, 700, 1, 16).contiguous()
    v = torch.arange(700.0, device=device)[None, :, None, None].expand(1, 700, 1, 8).contiguous()
    out, lse = foveate.attention(q, k, v, return_lse=True, backend=backend)
    exact = torch.softmax((q.double()[:, :, 0] @ k.double()[:, :, 0].mT) / 4, -1) @ v.double()[:, :, 0]
    torch.testing.assert_close(out[:, :, 0].double(), exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(lse, torch.full_like(lse, 50 * 20 * 16 / 4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nearly_every_option_at_once(dtype, backend, device, seed):
    case = AttentionCase(
        b=3, sq=48, skv=100, hq=6, hkv=2, d=64, dv=32, causal=True, window=(60, -1), softcap=8.0, bias="1h1k",
        mask="b11k", alibi="bh", relative="backward", sinks=True, kv_lens=True, dropout=0.25,
    )  # fmt: skip
    check_forward(dataclasses.replace(case, dtype=dtype), seed, backend, device)


def test_no_heads(backend, device):
    """Nothing in, nothing out, as torch's own: shapes, gradients, packed sequences and caches."""
    make = {"device": device, "requires_grad": True}
    q, k, v = torch.ones(2, 4, 0, 8, **make), torch.ones(2, 5, 0, 8, **make), torch.ones(2, 5, 0, 16, **make)
    out, lse = foveate.attention(q, k, v, causal=True, return_lse=True, backend=backend)
    assert out.shape == (2, 4, 0, 16) and lse.shape == (2, 0, 4)
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]
    cu = torch.tensor([0, 4], device=device)
    packed = foveate.attention_varlen(q[0], k[0, :4], v[0, :4], cu, cu, 4, 4, backend=backend)
    assert packed.shape == (4, 0, 16)
    q, k, v = q.detach(), k.detach(), v.detach()
    lens = torch.tensor([3, 5], device=device)
    assert foveate.attention_with_kv_cache(q[:, :1], k, v, kv_lens=lens, backend=backend).shape == (2, 1, 0, 16)
    with pytest.raises(ValueError, match="q has 2 heads and k and v have 0"):
        foveate.attention(q.new_ones(2, 4, 2, 8), k, v)
