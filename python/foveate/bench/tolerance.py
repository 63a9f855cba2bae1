"""What "right" means, for tests and benches alike: as exact as torch, or as the arithmetic that the op promises.

    max|ours - exact| <= max(factor * max|torch in the same dtype - exact|, floor) + eps(dtype) * max|exact|

exact is fp64; factor is 2, for gradients 3 (FlashAttention's rule). torch's error alone would make the limit a matter of luck: a sum of a
few elements comes out exact on one machine and not on another. So the floor bounds what the promised arithmetic may be off by: each
op adds up in fp32 (fp64 for fp64), and a sum of n products in any order is within n * eps * sum|a||b| of the exact one (Higham,
"Accuracy and Stability of Numerical Algorithms", 2002, section 3.1). The functions here give that bound for each op from the call's own
operands, with the largest element, norm or row where the sum itself would cost too much. They leave out what 16-bit results in between
round: torch rounds the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0

# Roundings of an element besides its sums: a scale, an exponential, a division, an option of the scores.
_STEPS = 8
_DRAWS = 4


class Measure(NamedTuple):
    """What an error is measured by: torch's largest, and the bound of the op's own arithmetic."""

    torch_error: float
    floor: float

    def limit(self, factor: float, largest: float, dtype: torch.dtype) -> float:
        """The largest error that a result of `dtype` may have, whose largest exact element is `largest`."""
        return max(factor * self.torch_error, self.floor) + torch.finfo(dtype).eps * largest


def accumulation_eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def largest(x: Tensor) -> float:
    """max|x| of the finite elements; 0 for an empty tensor."""
    x = x.detach().double()
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def sum_floor(length: int, magnitude: float, dtype: torch.dtype) -> float:
    """The error bound of sums of `length` products whose absolute values add up to `magnitude`, from inputs of `dtype`."""
    return accumulation_eps(dtype) * length * magnitude


def linear_floor(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The error bound of x @ weight.T + bias for x [..., K], weight [V, K]."""
    magnitude = torch.nn.functional.linear(
        x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs()
    )
    return sum_floor(x.shape[-1] + 1, largest(magnitude), x.dtype)


def model_floor(exact: Tensor, width: int, layers: int, dtype: torch.dtype) -> float:
    """The error bound of a whole network, whose norms keep what it adds up at its result's size: sums of `width` elements in each layer."""
    return sum_floor(width * layers, largest(exact), dtype)


def function_floors(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    length: int,
    dtype: torch.dtype,
    *,
    products: bool = True,
) -> list[float]:
    """For each result of an op, how far the exact one moves when every input moves by length * eps of itself.

    A sum's computed value is the exact one of such inputs (backward error), so this is the bound to first order, with the signs of the
    roundings drawn by chance. function: fp64 inputs -> results. length: of the longest sum. products: whether the inputs are
    summed up themselves; else (softmax sums exponentials) they only meet a few roundings each.
    """
    exact, generator = function(*inputs), torch.Generator().manual_seed(0)
    eps = accumulation_eps(dtype)
    floors = [eps * (length + _STEPS) * largest(x) for x in exact]
    step = eps * ((length if products else 0) + _STEPS)
    for _ in range(_DRAWS):
        signs = [torch.randint(2, t.shape, generator=generator).to(t) * 2 - 1 for t in inputs]
        moved = function(*(t * (1 + step * s) for t, s in zip(inputs, signs)))
        floors = [max(f, largest(a - b)) for f, a, b in zip(floors, moved, exact)]
    return floors


def attention_forward_floors(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, *, scale: float | None = None, bias: float = 0.0
) -> dict[str, float]:
    """`attention_bound` of out and lse without the probabilities, by sum|q||k| <= ||q|| ||k|| and sum P|v| <= max|v|.

    q, k, v: [..., S, H, D]. NaN in rows that nobody reads is left out.
    """
    keys = k.shape[-3] + _STEPS
    norms = [largest(x.double().norm(dim=-1)) for x in (q, k)]
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    score = accumulation_eps(dtype) * ((q.shape[-1] + _STEPS) * scale * norms[0] * norms[1] + bias)
    row = score + accumulation_eps(dtype) * keys
    return {"out": (score + row + accumulation_eps(dtype) * keys) * largest(v), "lse": row}


class AttentionBound(NamedTuple):
    """Bounds of attention's results. The gradients of q, k and v in their own layout; those of a score, [B, Hq, Sq, Skv], and of a sink,
    [B, Hq, Sq], before the sum over what shares them: the bound of each, and its absolute value."""

    out: float
    lse: float
    dq: float = 0.0
    dk: float = 0.0
    dv: float = 0.0
    dscore: tuple[Tensor, Tensor] | None = None
    dsink: tuple[Tensor, Tensor] | None = None


def attention_bound(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    dtype: torch.dtype,
    scale: float | None = None,
    bias: float = 0.0,
    dropout_p: float = 0.0,
    dout: Tensor | None = None,
    dlse: Tensor | None = None,
) -> AttentionBound:
    """q, dout: [B, Sq, Hq, D or Dv]; k, v: [B, Skv, Hkv, D or Dv], in the precision of the sums here; weights: the exact
    probabilities [B, Hq, Sq, Skv] before dropout, 0 where a query does not see a key; dtype: of the call; bias: the largest number
    that is added to a score; dlse: [B, Hq, Sq].

    With eps_S = eps (D sum|q||k| scale + bias) for a score, a probability is off by e P, e_ij = eps_S,ij + sum_j P eps_S + eps Skv. The
    rest follows from out = P v, dS = P (dO v - delta) with delta = dO out - dlse, dq = dS k, dk = dS' q and dv = P' dO, each sum n eps
    sum|a||b| more.
    """
    eps, kept = accumulation_eps(dtype), 1 / (1 - dropout_p)
    group, keys, dim_v = q.shape[2] // max(k.shape[2], 1), k.shape[1] + _STEPS, v.shape[-1] + _STEPS
    queries = q.shape[1] * group
    q, k, v = (x.detach().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    score = eps * ((q.shape[-1] + _STEPS) * scale * (q.abs() @ k.abs().mT) + bias)
    total = weights.sum(-1, keepdim=True)
    row = (weights * score).sum(-1, keepdim=True) + eps * keys
    error = score + row
    out = kept * largest(((error + eps * keys) * weights) @ v.abs())
    lse = largest((weights * score).sum(-1, keepdim=True) / total.clamp_min(1e-30)) + eps * keys
    if dout is None:
        return AttentionBound(out, lse)
    g = dout.detach().transpose(1, 2)
    magnitude = kept * (g.abs() @ v.abs().mT)
    dots, delta = (g * (weights @ v)).sum(-1, keepdim=True), (weights * magnitude).sum(-1, keepdim=True)
    if dlse is not None:
        dots, delta = dots - dlse[..., None], delta + dlse[..., None].abs()
    # With dropout the product's own sign is not known here.
    centred = magnitude + delta if dropout_p else (g @ v.mT - dots).abs()
    dscore_error = weights * (error * centred + eps * dim_v * (magnitude + delta))
    dscore = weights * centred
    heads = (k.shape[0], -1, group, k.shape[2])

    def shared(x: Tensor) -> float:  # a sum over the query heads of a KV head
        return largest(x.view(*heads, x.shape[-1]).sum(2))

    sink = 1 - total
    return AttentionBound(
        out,
        lse,
        scale * largest((dscore_error + eps * keys * dscore) @ k.abs()),
        scale * shared((dscore_error + eps * queries * dscore).mT @ q.abs()),
        kept * shared(((error + eps * queries) * weights).mT @ g.abs()),
        (dscore_error, dscore),
        ((sink * (row * dots.abs() + eps * dim_v * delta))[..., 0], (sink * delta)[..., 0]),
    )
