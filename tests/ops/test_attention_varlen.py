"""foveate.attention_varlen: packed sequences against fp64, against a loop, and against each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import compare
import foveate
from cases import VARLEN_CASES, AttentionCase, VarlenCase

pytestmark = [pytest.mark.amx, pytest.mark.kernels, pytest.mark.cuda, pytest.mark.interpreted]


def check_varlen(case: VarlenCase, seed: int, backend: str, device: str = "cpu") -> None:
    for backward in (False, True):
        check = "test_attention_varlen.check_varlen"
        compare.assert_case_as_good_as_torch(case, seed, backend, device, check, backward)


@pytest.mark.parametrize("case", VARLEN_CASES, ids=lambda case: case.id)
def test_against_exact(case, backend, device, seed):
    check_varlen(case, seed, backend, device)


@pytest.mark.interpreter_slow
@pytest.mark.parametrize("case", [c for c in VARLEN_CASES if not c.case.dropout], ids=lambda case: case.id)
def test_is_a_loop_over_sequences(case, backend, device, seed):
    """The same sequences one by one through foveate.attention; dropout is left out, where the batch index counts."""
    inputs = case.make_inputs(seed, device)
    out, lse = inputs.run(backend)
    exact, errors = compare.expected(case, seed, device, False)
    options = inputs.options()
    cu_q, cu_k = (cu.tolist() for cu in inputs.cu_seqlens)
    for b in range(len(case.lens_q)):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        if case.case.alibi == "bh":
            options["alibi_slopes"] = inputs.alibi_slopes[b]
        q, k, v = inputs.q[None, rows], inputs.k[None, keys], inputs.v[None, keys]
        one, one_lse = foveate.attention(q, k, v, return_lse=True, backend=backend, **options)
        compare.assert_within(one[0], out[rows], compare.FORWARD_FACTOR, errors["out"], f"sequence {b}: out")
        compare.assert_within(one_lse[0], lse[:, rows], compare.FORWARD_FACTOR, errors["lse"], f"sequence {b}: lse")


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_leak_nothing(causal, backend, device, seed):
    """A sequence's loss has no gradient in the others, and NaN in another sequence changes nothing, bitwise."""
    case = VarlenCase((20, 33, 7), (20, 65, 40), AttentionCase(hkv=2, causal=causal))
    clean = case.make_inputs(seed, device).requires_grad()
    out, _ = clean.run(backend)
    own_q, own_k = slice(20, 53), slice(20, 85)
    out[own_q].sum().backward()
    for x, own in ((clean.q, own_q), (clean.k, own_k), (clean.v, own_k)):
        outside = x.grad.clone()
        assert outside[own].any()
        outside[own] = 0
        assert not outside.any()
    dirty = case.make_inputs(seed, device)
    for x, own in ((dirty.q, own_q), (dirty.k, own_k), (dirty.v, own_k)):
        keep = x[own].clone()
        x.fill_(float("nan"))
        x[own] = keep
    assert torch.equal(dirty.run(backend)[0][own_q], out[own_q])


def test_order_of_sequences_is_neutral(backend, device, seed):
    case = VarlenCase((20, 33, 7), (20, 65, 40), AttentionCase(hkv=2, causal=True))
    inputs = case.make_inputs(seed, device)
    order = [2, 0, 1]
    turned = dataclasses.replace(
        case, lens_q=tuple(case.lens_q[i] for i in order), lens_k=tuple(case.lens_k[i] for i in order)
    )

    def repack(x, lens):
        parts = x.split(lens)
        return torch.cat([parts[i] for i in order])

    other = turned.make_inputs(seed, device).replace(
        q=repack(inputs.q, case.lens_q), k=repack(inputs.k, case.lens_k), v=repack(inputs.v, case.lens_k)
    )
    assert torch.equal(repack(inputs.run(backend)[0], case.lens_q), other.run(backend)[0])


def test_max_seqlen_may_be_larger(backend, device, seed):
    """It sizes the work only."""
    inputs = VarlenCase((20, 33), (20, 65), AttentionCase(causal=True)).make_inputs(seed, device)
    out, _ = inputs.run(backend)
    q, k, v = inputs.q, inputs.k, inputs.v
    roomy = foveate.attention_varlen(q, k, v, *inputs.cu_seqlens, 500, 700, causal=True, backend=backend)
    assert torch.equal(out, roomy)
