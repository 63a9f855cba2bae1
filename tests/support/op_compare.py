"""Value and gradients of an op against torch's in the same dtype, by the rule of compare.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compare import FORWARD_FACTOR, GRADIENT_FACTOR, assert_as_good_as_torch
from foveate.bench.tolerance import function_floors

# fp64 has no exact result to compare with: it must agree with torch's to this many roundings.
_FLOAT64_ROUNDINGS = 64


def compare_op(
    ours: Callable[..., Tensor], peer: Callable[..., Tensor], *inputs: Tensor, same_dtype: bool = True
) -> None:
    """ours(*inputs) against peer(*inputs) in the same dtype and in fp64, and the gradients of all inputs."""
    inputs = tuple(t.detach() for t in inputs)
    dout = torch.randn(peer(*inputs).shape)

    def run(function: Callable[..., Tensor], dtype: torch.dtype | None) -> list[Tensor]:
        leaves = [t.to(dtype or t.dtype).requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(inputs[0].dtype).to(out.dtype))]

    results = run(ours, None), run(peer, torch.float64), run(peer, None)
    floors = exact_floors(peer, inputs, dout.to(inputs[0].dtype))
    for i, (mine, exact, theirs, floor) in enumerate(zip(*results, floors)):
        name = f"gradient of input {i - 1}" if i else "out"
        assert mine.dtype == theirs.dtype or not same_dtype, f"{name} is {mine.dtype}, torch's is {theirs.dtype}"
        if mine.dtype == torch.float64:
            scale = float(exact.abs().max()) if exact.numel() else 0.0
            torch.testing.assert_close(mine, exact, rtol=0, atol=_FLOAT64_ROUNDINGS * 2.0**-53 * (scale + 1))
            continue
        assert_as_good_as_torch(mine, exact, theirs, GRADIENT_FACTOR if i else FORWARD_FACTOR, name, floor=floor)


def exact_floors(function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> list[float]:
    """The floors of function(*inputs) and of its gradients. No sum is longer than the largest size of an input."""

    def run(*leaves: Tensor) -> list[Tensor]:
        *leaves, upstream = (t.detach().requires_grad_() for t in leaves)
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    length = max((size for t in inputs for size in t.shape), default=1)
    return function_floors(run, [t.double() for t in (*inputs, dout)], length, inputs[0].dtype)
