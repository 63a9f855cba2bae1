"""Gradients of foveate.attention, through out and lse, for q, k, v, bias, sinks and the relative table."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import compare
import foveate
import poison
from cases import (
    ATTENTION_CASES,
    BF16_CASES,
    EMPTY,
    WIDE_HEAD_DIMS,
    AttentionCase,
    make_inputs,
    random_cases,
)
from foveate.backend.native import runs_cuda_kernels

pytestmark = [pytest.mark.amx, pytest.mark.kernels, pytest.mark.cuda, pytest.mark.interpreted]


def run(inputs, grads, backend, **options) -> dict[str, torch.Tensor]:
    """The gradients only."""
    everything = compare.results(inputs, lambda x: x.run(backend, **options), grads)
    return {name: value for name, value in everything.items() if name.startswith("d")}


def check_backward(case: AttentionCase, seed: int, backend: str, device: str = "cpu", **options) -> None:
    check = "test_attention_backward.check_backward"
    compare.assert_case_as_good_as_torch(case, seed, backend, device, check, backward=True, **options)


def slow_if_long(case: AttentionCase):
    """In Triton's interpreter: the backward is some ten times the forward."""
    return pytest.param(case, marks=pytest.mark.interpreter_slow if case.sq > 250 or case.skv > 400 else ())


@pytest.mark.parametrize("case", [slow_if_long(case) for case in ATTENTION_CASES], ids=lambda case: case.id)
def test_against_exact(case, backend, device, seed):
    check_backward(case, seed, backend, device)


@pytest.mark.gpu
@pytest.mark.interpreter_slow
@pytest.mark.parametrize("case", BF16_CASES, ids=lambda case: case.id)
def test_in_bf16(case, backend, device, seed):
    check_backward(case, seed, backend, device)


@pytest.mark.parametrize("case", WIDE_HEAD_DIMS, ids=lambda case: case.id)
def test_wide_head_dims(case, device, seed):
    if runs_cuda_kernels(device):
        with pytest.raises(foveate.UnsupportedError, match="head dims up to 256"):
            make_inputs(case, seed, device).run("native")
        return
    check_backward(case, seed, "native", device)


@pytest.mark.parametrize("dim", [8, 64, 192, 256, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_visible_key_has_no_gradient(dtype, dim, device):
    """dP - delta is exactly 0 on every instruction set: by one key in all, by a window, and by a mask."""
    if runs_cuda_kernels(device):
        pytest.skip("a property of the CPU kernels")
    torch.manual_seed(0)
    q, dout = torch.randn(2, 113, 4, dim).to(dtype), torch.randn(2, 113, 4, dim).to(dtype)
    k, v = (torch.randn(2, 7, 2, dim).to(dtype) for _ in range(2))
    mask = torch.zeros(1, 1, 1, 7, dtype=torch.bool)
    mask[..., 3] = True
    for keys, options in ((1, {}), (7, {"mask": mask}), (7, {"window": (0, 0)})):
        bias = torch.zeros(1, 4, 1, 1, dtype=dtype, requires_grad=True)
        leaves = [x.detach().requires_grad_() for x in (q, k[:, :keys])]
        out = foveate.attention(*leaves, v[:, :keys], bias=bias, backend="native", **options)
        for gradient in torch.autograd.grad(out, [*leaves, bias], dout):
            assert not gradient.any()


SHIFTED = [
    {},
    {"sinks": True, "causal": True},
    {"softcap": 3.0, "hkv": 1},
    {"dropout": 0.3},
    {"b": 1, "hq": 1, "hkv": 1, "sq": 60, "skv": 400},  # keys in chunks, each with a dq of its own
    {"b": 3, "kv_lens": True, "window": (9, 5)},
]


@pytest.mark.parametrize("shift", [300.0, 2.0**14, 2.0**20, -(2.0**20)])
@pytest.mark.parametrize("options", SHIFTED, ids=str)
def test_scores_that_are_large_together(options, shift, device, seed):
    """softmax does not see a number that all scores of a row share, nor may the backward pass, where max + log(sum) rounds to max.

    q and k are whole numbers and the scale a power of two, so that the shifted scores are exact.
    """
    if runs_cuda_kernels(device):
        pytest.skip("the CUDA kernels take lse as the one number that it is stored as")
    case = AttentionCase(**{"sq": 21, "skv": 37, "hq": 2, "hkv": 2, "d": 16, "scale": 0.25, "bias": "1111"} | options)
    inputs = make_inputs(case, seed, device)
    inputs = inputs.replace(q=inputs.q.round(), k=inputs.k.round(), bias=torch.zeros_like(inputs.bias))
    grads = compare.upstream(inputs, seed)
    exact = compare.results(inputs.to(torch.float64), lambda x: x.run("reference"), grads)
    floors = compare.floors(inputs, grads)
    sinks = None if inputs.sinks is None else inputs.sinks.round()
    moved = inputs.replace(bias=inputs.bias + shift, sinks=None if sinks is None else sinks + shift)
    if sinks is not None:
        exact = compare.results(inputs.replace(sinks=sinks).to(torch.float64), lambda x: x.run("reference"), grads)
    ours = compare.results(moved, lambda x: x.run("native"), grads)
    for name in ("out", "dq", "dk", "dv", "dsinks"):
        if name in ours:
            error = (ours[name].double() - exact[name]).abs().max()
            # With a softcap, tanh's own rounding is taken at the size of the shift.
            slack = 2.0**-24 * abs(shift) if case.softcap else 2e-5
            assert error <= floors[name] + slack * exact[name].abs().max(), name


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).min, -1e9, -1e4])
def test_rows_masked_by_a_large_number(value, device, seed):
    """A row that an additive mask takes all keys from is uniform by the definition, in the forward and in the backward pass."""
    if runs_cuda_kernels(device):
        pytest.skip("the CUDA kernels take lse as the one number that it is stored as")
    case = AttentionCase(sq=4, skv=9, hq=2, hkv=2, d=16, bias="qk")
    inputs = make_inputs(case, seed, device)
    bias = torch.zeros_like(inputs.bias)
    bias[0], bias[1, 4:] = value, value
    inputs, grads = inputs.replace(bias=bias), compare.upstream(inputs, seed)

    def definition(x):
        q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
        scores = q @ k.mT * 0.25
        absorbed = scores - scores.detach()  # what fp32 keeps of a score beside 1e9: its gradient alone
        rows = (torch.arange(4, device=scores.device) == 0)[:, None]
        scores = torch.where(rows & (abs(value) > 1e8), absorbed, scores + x.bias)
        return (scores.softmax(-1) @ v).transpose(1, 2), torch.logsumexp(scores, -1)

    grads = grads[0], torch.zeros_like(grads[1])
    ours = compare.results(inputs, lambda x: x.run("native"), grads)
    double = inputs.to(torch.float64)
    exact = compare.results(double, definition, grads)
    for name in ("out", "dq", "dk", "dv"):
        error = (ours[name].double() - exact[name]).abs().max() / exact[name].abs().max()
        assert error < (1e-5 if abs(value) > 1e8 else 2e-3), name  # at 1e4 the scores themselves round at 5e-4


@pytest.mark.interpreter_slow
@pytest.mark.parametrize("index", range(40))
def test_random(index, backend, device, seed):
    # Other cases than the forward's, from another seed.
    case = random_cases(index + 1, seed + 1000)[index]
    check_backward(case, seed + index, backend, device)


# Where equal bits are not asked for, the CUDA kernels of 16-bit types compute dq elsewhere: one case for each of their instances.
DETERMINISTIC = [
    AttentionCase(
        b=1, sq=70, skv=140, hq=2, hkv=1, d=d, dv=dv, causal=causal, softcap=softcap, dropout=dropout, dtype=dtype
    )
    for d, dv, dtype in (
        (64, 64, torch.bfloat16),
        (96, 72, torch.bfloat16),
        (128, 96, torch.float16),
        (136, 200, torch.bfloat16),
    )
    for causal, softcap, dropout in ((True, None, 0.0), (False, 2.0, 0.1))
]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", DETERMINISTIC, ids=lambda case: case.id)
def test_deterministic_or_not(case, deterministic, backend, device, seed):
    check_backward(case, seed, backend, device, deterministic=deterministic)


BIAS_DIMS = ["bhqk", "1hqk", "b1qk", "bh1k", "bhq1", "11qk", "1h11", "b111", "1111", "hqk", "qk", "k", "1"]


@pytest.mark.parametrize("dims", BIAS_DIMS)
def test_bias_gradient_sums_over_broadcast_dims(dims, backend, device, seed):
    check_backward(AttentionCase(b=3, sq=29, skv=75, hq=4, hkv=2, bias=dims, causal=True), seed, backend, device)


@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.id)
def test_empty_tensors(case, backend, device, seed):
    inputs = make_inputs(case, seed, device)
    for name, grad in run(inputs, compare.upstream(inputs, seed), backend).items():
        assert grad.shape == inputs.leaves[name[1:]].shape
        assert not grad.any(), f"{name} is not zero"


@pytest.mark.parametrize("only", ["out", "lse"])
def test_one_output_alone(only, backend, device, seed):
    """autograd passes no gradient for the output that the loss does not use; that equals a gradient of zeros."""
    case = AttentionCase(sq=40, skv=70, hkv=2, causal=True, sinks=True)
    inputs = make_inputs(case, seed, device)
    dout, dlse = compare.upstream(inputs, seed)
    zeros = (dout, torch.zeros_like(dlse)) if only == "out" else (torch.zeros_like(dout), dlse)
    both = run(inputs, zeros, backend, deterministic=True)
    inputs = inputs.requires_grad()
    result = dict(zip(("out", "lse"), inputs.run(backend, deterministic=True)))[only]
    result.backward(dout if only == "out" else dlse)
    for name, leaf in inputs.leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert torch.equal(grad, both[f"d{name}"]), f"d{name} differs"


@pytest.mark.parametrize("leaf", ["q", "k", "v", "bias", "table", "sinks"])
def test_one_input_alone(leaf, backend, device, seed):
    """Only one input requires a gradient: it gets the same one, bitwise, as when all do."""
    case = AttentionCase(sq=40, skv=70, hkv=2, bias="1h1k", relative="bidirectional", sinks=True)
    inputs = make_inputs(case, seed, device)
    dout, _ = grads = compare.upstream(inputs, seed)
    together = run(inputs, (dout, torch.zeros_like(grads[1])), backend, deterministic=True)[f"d{leaf}"]
    alone = inputs.replace(**{leaf: inputs.leaves[leaf].clone().requires_grad_()})
    out, _ = alone.run(backend, deterministic=True)
    out.backward(dout)
    assert torch.equal(alone.leaves[leaf].grad, together)


POISONED = [
    AttentionCase(b=3, sq=20, skv=150, hkv=2, kv_lens=True, causal=True),
    AttentionCase(b=3, sq=70, skv=70, hkv=2, d=40, dv=24, kv_lens=True, dropout=0.2, sinks=True),
    AttentionCase(b=3, sq=33, skv=65, kv_lens=True, relative="bidirectional", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.id)
def test_nothing_outside_is_read_or_written(case, backend, device, seed):
    inputs = make_inputs(case, seed, device)
    grads = compare.upstream(inputs, seed)
    clean = run(inputs, grads, backend, deterministic=True)
    dirty = inputs.replace(
        q=poison.nan_padded(inputs.q),
        k=poison.nan_padded(poison.nan_beyond(inputs.k, inputs.kv_lens)),
        v=poison.nan_padded(poison.nan_beyond(inputs.v, inputs.kv_lens)),
    )
    with poison.guarded_outputs() as guard:
        poisoned = run(dirty, (poison.nan_padded(grads[0]), grads[1]), backend, deterministic=True)
    assert guard.buffers or backend == "reference", "no output was allocated through torch.empty, so none was guarded"
    for name in clean:
        assert torch.equal(clean[name], poisoned[name]), f"{name} depends on memory that the call must not read"
    for b, length in enumerate(inputs.kv_lens.tolist()):
        assert not poisoned["dk"][b, length:].any() and not poisoned["dv"][b, length:].any()


GRADCHECK = [
    AttentionCase(),
    AttentionCase(causal=True),
    AttentionCase(window=(2, 1)),
    AttentionCase(softcap=1.5),
    AttentionCase(bias="bhqk"),
    AttentionCase(bias="1h1k"),
    AttentionCase(bias="q1"),
    AttentionCase(mask="bhqk"),
    AttentionCase(alibi="h"),
    AttentionCase(relative="bidirectional"),
    AttentionCase(relative="backward", causal=True),
    AttentionCase(sinks=True),
    AttentionCase(kv_lens=True, b=3),
    AttentionCase(dropout=0.4),
    AttentionCase(
        b=3,
        hkv=1,
        dv=16,
        causal=True,
        window=(3, -1),
        softcap=2.0,
        bias="b1q1",
        mask="11qk",
        alibi="bh",
        relative="backward",
        sinks=True,
        kv_lens=True,
        dropout=0.3,
    ),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=lambda case: case.id)
def test_gradcheck(case, backend, device, seed):
    case = dataclasses.replace(case, sq=3, skv=5, hq=2, hkv=min(case.hkv, 2), d=8, dtype=torch.float64)
    inputs = make_inputs(case, seed, device).requires_grad()
    names = list(inputs.leaves)

    def function(*leaves):
        these = inputs.replace(**dict(zip(names, leaves)))
        out, lse = these.run(backend)
        # Finite differences of -inf are NaN.
        return out, torch.where(lse.isinf(), 0, lse)

    assert torch.autograd.gradcheck(function, tuple(inputs.leaves.values()))
