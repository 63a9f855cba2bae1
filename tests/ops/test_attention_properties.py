"""What must hold whatever the numbers are: symmetries, unions, dropout masks, determinism, empty rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import compare
import foveate
from cases import AttentionCase, make_inputs

pytestmark = [pytest.mark.sanitize, pytest.mark.interpreted]

BROAD = AttentionCase(
    b=4, sq=45, skv=70, hq=4, hkv=2, causal=True, softcap=4.0, bias="b11k", mask="b1qk", alibi="bh", sinks=True,
    kv_lens=True
)  # fmt: skip


@pytest.mark.interpreter_slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_permutation_is_bitwise_neutral(dtype, backend, device, seed):
    inputs = make_inputs(dataclasses.replace(BROAD, dtype=dtype), seed, device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    names = ("q", "k", "v", "bias", "mask", "alibi_slopes", "kv_lens")
    permuted = inputs.replace(**{name: getattr(inputs, name)[order] for name in names})
    grads = compare.upstream(inputs, seed)
    before = compare.results(inputs, lambda x: x.run(backend), grads)
    after = compare.results(permuted, lambda x: x.run(backend), tuple(g[order] for g in grads))
    for name in ("out", "lse", "dq", "dk", "dv", "dbias"):
        assert torch.equal(before[name][order], after[name]), f"{name} depends on the place in the batch"


def test_kv_lens_is_slicing(backend, device, seed):
    """Each sequence with its keys cut to kv_lens, bias and mask too, gives the same."""
    inputs = make_inputs(BROAD, seed, device)
    out, lse = inputs.run(backend)
    _, errors = compare.expected(BROAD, seed, device, False)
    options = inputs.options() | {"kv_lens": None}
    for b, length in enumerate(inputs.kv_lens.tolist()):
        one = slice(b, b + 1)
        cut = options | {
            "bias": inputs.bias[one, ..., :length],
            "mask": inputs.mask[one, ..., :length],
            "alibi_slopes": inputs.alibi_slopes[one],
        }
        q, k, v = inputs.q[one], inputs.k[one, :length], inputs.v[one, :length]
        sliced, sliced_lse = foveate.attention(q, k, v, return_lse=True, backend=backend, **cut)
        compare.assert_within(out[one], sliced, compare.FORWARD_FACTOR, errors["out"], f"sequence {b}: out")
        compare.assert_within(lse[one], sliced_lse, compare.FORWARD_FACTOR, errors["lse"], f"sequence {b}: lse")


@pytest.mark.interpreter_slow
@pytest.mark.parametrize("split", [0, 1, 33, 70])
def test_merge_is_attention_over_the_union(split, backend, device, seed):
    """Two parts of the keys, merged, against all of them; forward, and gradients through both outputs of the merge."""
    case = AttentionCase(sq=20, skv=70, hkv=2, mask="b11k")
    inputs = make_inputs(case, seed, device)

    def merged(x):
        parts = [
            foveate.attention(x.q, x.k[:, part], x.v[:, part], mask=x.mask[..., part], return_lse=True, backend=backend)
            for part in (slice(0, split), slice(split, None))
        ]
        return foveate.merge_attention(*parts[0], *parts[1])

    exact, errors = compare.expected(case, seed, device, True)
    ours = compare.results(inputs, merged, compare.upstream(inputs, seed))
    for name, value in ours.items():
        factor = compare.GRADIENT_FACTOR if name.startswith("d") else compare.FORWARD_FACTOR
        # Two partial results are rounded once more each.
        compare.assert_within(value, exact[name], factor + 1, errors[name], name)


def test_merge_of_empty_rows():
    """A row that is empty on one side takes the other; empty on both it stays empty, with zero gradients."""
    out_a = torch.tensor([[[[1.0]], [[0.0]], [[0.0]]]], requires_grad=True)  # [1, 3, 1, 1]
    out_b = torch.tensor([[[[0.0]], [[2.0]], [[0.0]]]], requires_grad=True)
    inf = float("inf")
    lse_a = torch.tensor([[[0.5, -inf, -inf]]], requires_grad=True)
    lse_b = torch.tensor([[[-inf, 0.25, -inf]]], requires_grad=True)
    out, lse = foveate.merge_attention(out_a, lse_a, out_b, lse_b)
    assert out.flatten().tolist() == [1.0, 2.0, 0.0]
    assert lse.flatten().tolist() == [0.5, 0.25, -inf]
    (out.sum() + lse[lse > -inf].sum()).backward()
    assert out_a.grad.flatten().tolist() == [1, 0, 0]
    assert out_b.grad.flatten().tolist() == [0, 1, 0]
    assert lse_a.grad.flatten().tolist() == [1, 0, 0]
    assert lse_b.grad.flatten().tolist() == [0, 1, 0]


def test_merge_packed_layout(device, seed):
    """[total, H, Dv] with lse [H, total] merges as [1, total, H, Dv] with [1, H, total]."""
    generator = torch.Generator().manual_seed(seed)
    outs = [torch.randn(5, 3, 8, generator=generator).to(device) for _ in range(2)]
    lses = [torch.randn(3, 5, generator=generator).to(device) for _ in range(2)]
    out, lse = foveate.merge_attention(outs[0], lses[0], outs[1], lses[1])
    batched, batched_lse = foveate.merge_attention(outs[0][None], lses[0][None], outs[1][None], lses[1][None])
    assert torch.equal(out, batched[0])
    assert torch.equal(lse, batched_lse[0])


def drawn_mask(backend: str, device: str, p: float, seed: int, dtype=torch.float32) -> torch.Tensor:
    """The kept weights [B, Hq, Sq, Skv] of a call: with equal scores and v = identity, out is the weights."""
    b, sq, skv, hq = 2, 50, 70, 4
    q = torch.zeros(b, sq, hq, 8, device=device, dtype=dtype)
    k = torch.zeros(b, skv, 1, 8, device=device, dtype=dtype)
    v = torch.eye(skv, 72, device=device, dtype=dtype)[None, :, None].expand(b, skv, 1, 72)
    generator = torch.Generator(device).manual_seed(seed)
    weights = foveate.attention(q, k, v, dropout_p=p, generator=generator, backend=backend)
    assert not weights[..., skv:].any()
    kept = weights[..., :skv].transpose(1, 2)
    torch.testing.assert_close(
        kept[kept != 0], torch.full_like(kept[kept != 0], 1 / (skv * (1 - p))), rtol=1e-2, atol=0
    )
    return kept != 0


def test_backends_draw_the_same_dropout_mask(backend, device, seed):
    p = 0.3
    mask = drawn_mask(backend, device, p, seed)
    assert torch.equal(mask, drawn_mask("reference", device, p, seed))
    assert torch.equal(mask, drawn_mask(backend, device, p, seed, torch.bfloat16)), "the dtype changes the mask"
    assert not torch.equal(mask, drawn_mask(backend, device, p, seed + 1))
    # 28000 draws: 5 standard deviations are 0.0137.
    assert abs(mask.float().mean() - (1 - p)) < 0.0137
    assert not torch.equal(mask[0], mask[1]) and not torch.equal(mask[:, 0], mask[:, 1])
    # What a larger p keeps, a smaller one keeps too: the words are the same, only the threshold moves.
    assert (mask | ~drawn_mask(backend, device, 0.6, seed)).all()


def test_generator_advances(backend, device):
    """Two calls with one generator draw different masks; without one, torch.manual_seed decides."""
    case = AttentionCase(dropout=0.5)
    inputs = make_inputs(case, 0, device)
    generator = torch.Generator(device).manual_seed(3)
    options = inputs.options() | {"generator": generator, "backend": backend}
    first, second = (foveate.attention(inputs.q, inputs.k, inputs.v, **options) for _ in range(2))
    assert not torch.equal(first, second)
    options["generator"] = None
    outs = []
    for global_seed in (1, 1, 2):
        torch.manual_seed(global_seed)
        outs.append(foveate.attention(inputs.q, inputs.k, inputs.v, **options))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_dropout_zero_is_no_dropout(backend, device, seed):
    inputs = make_inputs(AttentionCase(), seed, device)
    plain = foveate.attention(inputs.q, inputs.k, inputs.v, backend=backend)
    assert torch.equal(plain, foveate.attention(inputs.q, inputs.k, inputs.v, dropout_p=0.0, backend=backend))


@pytest.mark.interpreter_slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_is_bitwise(dtype, backend, device, seed):
    case = AttentionCase(
        b=2, sq=150, skv=200, hq=8, hkv=2, causal=True, bias="1h1k", relative="backward", sinks=True, dropout=0.1,
        dtype=dtype
    )  # fmt: skip
    inputs = make_inputs(case, seed, device)
    grads = compare.upstream(inputs, seed)
    first, *others = (compare.results(inputs, lambda x: x.run(backend, deterministic=True), grads) for _ in range(3))
    for other in others:
        for name in first:
            assert torch.equal(first[name], other[name]), f"{name} differs between two runs"


EMPTY_ROWS = {
    "mask": dict(mask=torch.zeros(1, 1, 1, 9, dtype=torch.bool)),
    "kv_lens 0": dict(kv_lens=torch.zeros(2, dtype=torch.int32)),
    "bias of -inf": dict(bias=torch.full((1, 1, 6, 9), float("-inf"))),
    "window and kv_lens": dict(window=(0, 0), kv_lens=torch.zeros(2, dtype=torch.int32), sinks=torch.ones(4)),
    "mask with sinks": dict(mask=torch.zeros(6, 9, dtype=torch.bool), sinks=torch.ones(4)),
    "mask with softcap and alibi": dict(
        mask=torch.zeros(6, 9, dtype=torch.bool), softcap=1.0, alibi_slopes=torch.ones(4)
    ),
    "mask with dropout": dict(mask=torch.zeros(6, 9, dtype=torch.bool), dropout_p=0.5),
}


@pytest.mark.parametrize("options", EMPTY_ROWS.values(), ids=EMPTY_ROWS.keys())
def test_rows_that_see_no_key(options, backend, device, seed):
    """out 0, lse -inf and all gradients 0, though lse receives a gradient there."""
    inputs = make_inputs(AttentionCase(sq=6, skv=9, hkv=2), seed, device).requires_grad()
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    leaves = [inputs.q, inputs.k, inputs.v]
    for name in ("bias", "sinks"):
        if name in options:
            options[name] = options[name].clone().requires_grad_()
            leaves.append(options[name])
    out, lse = foveate.attention(inputs.q, inputs.k, inputs.v, return_lse=True, backend=backend, **options)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, float("-inf")))
    for grad in torch.autograd.grad([out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_causal_with_more_queries_than_keys(backend, device, seed):
    """Bottom-right: of 7 queries the first 4 see none of the 3 keys, the last sees all."""
    inputs = make_inputs(AttentionCase(sq=7, skv=3), seed, device)
    out, lse = foveate.attention(inputs.q, inputs.k, inputs.v, causal=True, return_lse=True, backend=backend)
    assert not out[:, :4].any()
    assert (lse[..., :4] == float("-inf")).all() and (lse[..., 4:] > float("-inf")).all()
    # One visible key: its value.
    torch.testing.assert_close(out[:, 4], inputs.v[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.interpreter_slow
def test_bias_of_minus_infinity_is_a_mask(backend, device, seed):
    inputs = make_inputs(AttentionCase(sq=40, skv=70, mask="b1qk"), seed, device)
    bias = torch.zeros(inputs.mask.shape, device=device).masked_fill(~inputs.mask, float("-inf"))
    masked = foveate.attention(inputs.q, inputs.k, inputs.v, mask=inputs.mask, backend=backend)
    biased = foveate.attention(inputs.q, inputs.k, inputs.v, bias=bias, backend=backend)
    torch.testing.assert_close(biased, masked, rtol=1e-6, atol=1e-6)
    assert torch.equal(masked == 0, biased == 0)


@pytest.mark.interpreter_slow
def test_relative_bias_is_a_bias(backend, device, seed):
    """The fused lookup against the same values given as a dense bias, in the result and in the table's gradient."""
    from foveate.backend.reference import attention as reference

    case = AttentionCase(sq=30, skv=90, hkv=2, relative="bidirectional")
    inputs = make_inputs(case, seed, device).requires_grad()
    distance = torch.arange(90, device=device) - (torch.arange(30, device=device)[:, None] + 60)
    buckets = reference.relative_buckets(distance, 16, True, 40)
    assert buckets.unique().numel() >= 12, "the case meets too few buckets"
    dense = inputs.table[buckets].permute(2, 0, 1)[None]
    fused, _ = inputs.run(backend)
    explicit = foveate.attention(inputs.q, inputs.k, inputs.v, bias=dense, backend=backend)
    torch.testing.assert_close(fused, explicit, rtol=1e-5, atol=1e-6)
    dout, _ = compare.upstream(inputs, seed)
    (a,), (b,) = (torch.autograd.grad(out, [inputs.table], dout) for out in (fused, explicit))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter_slow
def test_nan_in_the_inputs_stays_visible(backend, device, seed):
    """A NaN that the call does read is not hidden: that row of the output is NaN, and only rows that see it."""
    inputs = make_inputs(AttentionCase(b=1, sq=40, skv=40, hq=2, hkv=2), seed, device)
    inputs.q[0, 7, 1, 3] = float("nan")
    out, lse = foveate.attention(inputs.q, inputs.k, inputs.v, return_lse=True, backend=backend)
    where = torch.zeros(1, 40, 2, dtype=torch.bool, device=device)
    where[0, 7, 1] = True
    assert torch.equal(out.isnan(), where[..., None].expand_as(out))
    assert torch.equal(lse.isnan(), where.transpose(1, 2))
