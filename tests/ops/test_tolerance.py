"""The tolerance rule: what is right passes on every machine, what is 5 % wrong fails everywhere."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import compare
from cases import ATTENTION_CASES, DTYPES, HEAD_DIMS, SINGLE_OPTION, VARLEN_CASES, AttentionCase, VarlenCase
from foveate.bench.tolerance import (
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    Measure,
    attention_bound,
    attention_forward_floors,
    function_floors,
    largest,
    linear_floor,
)
from op_compare import compare_op

WRONG = 0.05
TIGHT = [*SINGLE_OPTION, *HEAD_DIMS[::3], *DTYPES[::2], *VARLEN_CASES[:10], *ATTENTION_CASES[-4:]]


def dtype_of(case: AttentionCase | VarlenCase) -> torch.dtype:
    return case.case.dtype if isinstance(case, VarlenCase) else case.dtype


@pytest.mark.parametrize("case", TIGHT, ids=lambda case: case.id)
def test_five_percent_of_a_result_are_beyond_the_floor(case):
    """The floor, whatever torch's error. A gradient that is 0 but for rounding has no 5 %: a bias that all scores share."""
    exact, measures = compare.expected(case, 1, "cpu", True)
    for name, right in exact.items():
        size = largest(right)
        if size == 0 or (name == "dbias" and right.numel() == 1):
            continue
        dtype = torch.float32 if name == "lse" else dtype_of(case)
        assert Measure(0.0, measures[name].floor).limit(1.0, size, dtype) < WRONG * size / 2, name
        if dtype == torch.float32:
            factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
            assert measures[name].limit(factor, size, dtype) < WRONG * size, name


MUTANTS = {
    "scale": {"scale": 32**-0.5 * (1 + WRONG)},
    "softcap": {"softcap": 2.0 * (1 + WRONG)},
    "window": {"window": (5, 2)},
    "causal": {"causal": False},
    "dropout": {"dropout_p": 0.3 * (1 - WRONG)},
}
ORIGINALS = {
    "scale": AttentionCase(),
    "softcap": AttentionCase(softcap=2.0),
    "window": AttentionCase(window=(5, 3)),
    "causal": AttentionCase(causal=True),
    "dropout": AttentionCase(dropout=0.3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", MUTANTS)
def test_attention_that_is_wrong_fails(name, backward, dtype):
    case = dataclasses.replace(ORIGINALS[name], dtype=dtype)
    check = "compare.assert_case_as_good_as_torch"
    compare.assert_case_as_good_as_torch(case, 3, "native", "cpu", check, backward)
    with pytest.raises(AssertionError, match="max error"):
        compare.assert_case_as_good_as_torch(case, 3, "native", "cpu", check, backward, **MUTANTS[name])


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout * (1 + WRONG)


ROWS = torch.randn(5, 700, generator=torch.Generator().manual_seed(1))
OPS = {
    "softmax": (lambda x: torch.softmax(x, -1), [ROWS]),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), [ROWS]),
    "cross_entropy": (lambda x: F.cross_entropy(x, torch.arange(5)), [ROWS]),
    "rms_norm": (lambda x, w: F.rms_norm(x, (700,), w, 1e-5), [ROWS, ROWS[0]]),
    "product": (lambda x, w: x @ w.T, [ROWS, ROWS[:3]]),
}


@pytest.mark.parametrize("name", OPS)
def test_rows_that_are_wrong_fail(name):
    function, inputs = OPS[name]
    compare_op(function, function, *inputs)
    with pytest.raises(AssertionError, match="out: max error"):
        compare_op(lambda *x: function(*x) * (1 + WRONG), function, *inputs)
    with pytest.raises(AssertionError, match="gradient of input 0: max error"):
        compare_op(lambda x, *rest: function(_WrongGradient.apply(x), *rest), function, *inputs)


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize(("inner", "outer"), [(1, 5), (32, 1), (96, 33), (1536, 95)])
def test_linear_needs_no_luck(inner, outer, rows):
    """Sums in another order than torch's are within the floor alone; a weight that is 5 % larger is not."""
    x, weight, bias = torch.randn(rows, inner), torch.randn(outer, inner) / inner**0.5, torch.randn(outer)
    floor = linear_floor(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), bias.double())
    order = torch.randperm(inner)
    summed = bias + sum(x[:, i, None] * weight[None, :, i] for i in order.tolist())
    compare.assert_as_good_as_torch(summed, exact, exact, floor=floor)
    with pytest.raises(AssertionError, match="max error"):
        compare.assert_as_good_as_torch(F.linear(x, weight * (1 + WRONG), bias), exact, exact, floor=floor)


def test_attention_floors_hold_what_fp32_does():
    """The bounds are not met by chance: results in fp32, with sums in the other order too, stay within the floor alone."""
    for seed in range(5):
        torch.manual_seed(seed)
        q, k, v, dout = (torch.randn(2, n, h, 32) for n, h in ((40, 4), (70, 2), (70, 2), (40, 4)))

        def results(dtype, q=q, k=k, v=v, dout=dout):
            leaves = [x.to(dtype).transpose(1, 2).requires_grad_() for x in (q, k, v)]
            heads = [leaves[0], *(x.repeat_interleave(2, 1) for x in leaves[1:])]
            weights = (heads[0] @ heads[1].mT * 32**-0.5).softmax(-1)
            out = weights @ heads[2]
            grads = torch.autograd.grad(out, leaves, dout.to(dtype).transpose(1, 2))
            return weights.detach(), {"out": out, **dict(zip(("dq", "dk", "dv"), grads))}

        weights, exact = results(torch.float64)
        double = [x.double() for x in (q, k, v, dout)]
        bound = attention_bound(*double[:3], weights, dtype=torch.float32, dout=double[3])
        rough = attention_forward_floors(q, k, v, torch.float32)
        for name, value in results(torch.float32)[1].items():
            error = largest(value - exact[name])
            assert 0 < error < getattr(bound, name) < WRONG / 2 * largest(exact[name]), name
        assert bound.out <= rough["out"] < WRONG / 2 * largest(exact["out"])


def test_floors_grow_with_the_sum():
    """By the definition: eps times length times magnitude, of the accumulation's eps."""
    x = torch.ones(1, 1000)
    assert linear_floor(x, x) == pytest.approx(2**-23 * 1001 * 1000)
    assert linear_floor(x.bfloat16(), x.bfloat16()) == linear_floor(x, x)
    assert linear_floor(x.double(), x.double()) == pytest.approx(2**-52 * 1001 * 1000)
    short, long = (function_floors(lambda t: [t.sum()], [x.double()], n, torch.float32)[0] for n in (10, 1000))
    assert long > 10 * short > 0
