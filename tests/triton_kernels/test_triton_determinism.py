"""Two backward passes on the Triton kernels give the same bits: there are no atomics. What can differ shows on a GPU only, where programs
finish in any order; under the interpreter this holds for random words and memory that was not initialised."""

from __future__ import annotations

import pytest
import torch

import compare
import foveate
from cases import AttentionCase, VarlenCase

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]

if foveate.backends()["triton"] is not None:
    pytest.skip(f"triton: {foveate.backends()['triton']}", allow_module_level=True)

BF16 = torch.bfloat16
BIG = {
    "b": 4,
    "sq": 900,
    "skv": 1100,
    "hq": 8,
    "d": 64,
    "dtype": BF16,
}  # for a GPU: many programs, none alone on its part
SMALL = {"b": 2, "sq": 37, "skv": 70, "hq": 4, "d": 32}
CASES = [
    {"causal": True},
    {"hkv": 2, "window": (20, 9), "sinks": True, "dropout": 0.2},
    {"bias": "1h1k", "relative": "bidirectional", "softcap": 5.0},
    {"bias": "b1q1", "mask": "11qk", "alibi": "h"},
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_attention(options, deterministic, device, seed):
    case = AttentionCase(**(SMALL if device == "cpu" else BIG), **options)
    check(case, device, seed, deterministic=deterministic)


def test_attention_varlen(device, seed):
    sizes = SMALL if device == "cpu" else BIG
    lens = (30, 5, 41) if device == "cpu" else (300, 1, 1200, 77)
    case = AttentionCase(hq=sizes["hq"], hkv=2, d=sizes["d"], causal=True, sinks=True)
    check(VarlenCase(lens, lens, case), device, seed)


def check(case, device, seed, **more) -> None:
    inputs = case.make_inputs(seed, device)
    grads = compare.upstream(inputs, seed)
    first, second = (compare.results(inputs, lambda x: x.run("triton", **more), grads) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two runs"


def test_losses_and_norms(device):
    tokens = 40 if device == "cpu" else 5000
    hidden, weight = (torch.randn(n, 64, device=device, requires_grad=True) for n in (tokens, 300))
    target = torch.randint(0, 300, (tokens,), device=device)
    scale = torch.rand(64, device=device, requires_grad=True)

    def grads():
        normed = foveate.rms_norm(hidden, scale, 1e-5, backend="triton")
        loss = foveate.linear_cross_entropy(normed, weight, target, backend="triton")
        return torch.autograd.grad(loss, (hidden, weight, scale))

    for a, b in zip(grads(), grads()):
        assert torch.equal(a, b)
