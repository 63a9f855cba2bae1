"""Quantisers that search: of several scales of a block the one with the least weighted squared error is taken.

A weight x of a block is stored as an integer q. For each candidate scale the integers follow by rounding, and from them, by least squares,
the scale (and minimum) that fits them best; the candidate with the least sum of v (x - stored)**2 wins. v is what an error costs:

    affine formats (q4_1, q4_k, q5_k)    v = |x| + root mean square of the block, or, with importance, i sqrt(2 mean x**2 + x**2)
    symmetric ones (q6_k, iq4_nl)        v = x**2, or i

where i is the importance of the input feature: the mean of the squares of what comes in there (`foveate.quantization.importance`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.quantization.k_blocks import IQ4_NL, SUPER_BLOCK, join_affine, join_q6

_CHUNK = 2**19  # weights at a time: what a candidate makes of them stays in a cache
_TINY = 1e-30


def quantize_searched(weight: Tensor, format: str, importance: Tensor | None) -> Tensor:
    """The blocks, uint8 [out, bytes], of finite fp32 `weight` [out, in]. importance: fp32 [in], or None. On the weight's device."""
    block, of_chunk = _OF_FORMAT[format]
    rows = weight.reshape(-1, block)
    per_row = weight.shape[1] // block
    important = None if importance is None else _cleaned(importance).to(weight.device).view(per_row, block)
    step = max(1, _CHUNK // block // per_row) * per_row  # whole rows, so that each chunk has the same importance
    repeated = None if important is None else important.repeat(min(step, len(rows)) // per_row, 1)
    found = []
    for x in rows.split(step):
        found.append(of_chunk(x, None if repeated is None else repeated[: len(x)]))
    return torch.cat(found).view(len(weight), -1)


def _cleaned(importance: Tensor) -> Tensor:
    """Around 1, and nowhere 0: an input that the text never met still has weights that must be near."""
    mean = importance.float().mean()
    return (importance.float() / mean).clamp(min=1e-4) if mean > 0 else torch.ones_like(importance, dtype=torch.float32)


def _costs(x: Tensor, importance: Tensor | None, whole: Tensor) -> Tensor:
    """v of blocks x [b, n] in an affine format. whole: mean x**2 of what shares a super-block, [n]."""
    if importance is not None:
        return importance * (2 * whole + x * x).sqrt()
    return x.abs() + x.square().mean(0).sqrt()


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 for 0"""
    return torch.where(x == 0, 0, 1 / torch.where(x == 0, 1, x))


def _affine(x: Tensor, v: Tensor, levels: int, offsets: Tensor, below_zero: bool) -> tuple[Tensor, Tensor]:
    """(scale, minimum) [n] of x ~ scale q + minimum with q in 0..levels, for blocks x [b, n], a column each. below_zero: the minimum is at
    most 0, as super-blocks store it."""
    least, most = x.amin(0), x.amax(0)
    if below_zero:
        least = least.clamp(max=0)
    span = most - least
    from_least = (x - least) * _inverse(span)  # 0..1
    vx = v * x
    sum_v, sum_x, sum_xx = v.sum(0), vx.sum(0), (vx * x).sum(0)
    scale, minimum = span / levels, least.clone()
    best = torch.full_like(span, torch.inf)

    def consider(q: Tensor) -> None:
        nonlocal scale, minimum, best
        vq = v * q
        sum_q, sum_xq, sum_qq = vq.sum(0), (vx * q).sum(0), vq.mul_(q).sum(0)
        determinant = sum_v * sum_qq - sum_q * sum_q
        solvable = determinant > 1e-7 * sum_v * sum_qq
        safe = torch.where(solvable, determinant, 1)
        a, b = (sum_v * sum_xq - sum_x * sum_q) / safe, (sum_qq * sum_x - sum_q * sum_xq) / safe
        if below_zero:
            b, a = torch.where(b > 0, 0, b), torch.where(b > 0, sum_xq / sum_qq.clamp(min=_TINY), a)
        error = sum_xx - 2 * a * sum_xq - 2 * b * sum_x + a * a * sum_qq + 2 * a * b * sum_q + b * b * sum_v
        better = solvable & (error < best) & (a > 0)
        scale, minimum = torch.where(better, a, scale), torch.where(better, b, minimum)
        best = torch.where(better, error, best)

    for offset in offsets.tolist():
        consider((from_least * (levels + offset)).round_().clamp_(0, levels))
    for _ in range(2):
        consider(_rounded(x - minimum, scale, levels))
    return scale, minimum


def _rounded(x: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Integers 0..levels; x is used up."""
    return x.mul_(_inverse(scale)).round_().clamp_(0, levels)


def _of_q4_1(x: Tensor, importance: Tensor | None) -> Tensor:
    columns = x.t().contiguous()
    v = _costs(columns, None if importance is None else importance.t(), columns.square().mean(0))
    scale, minimum = _affine(columns, v, 15, torch.linspace(-1, 1, 21), below_zero=False)
    d, m = scale.half(), minimum.half()
    q = _rounded(columns - m.float(), d.float(), 15).to(torch.uint8)
    return torch.cat([_bytes(d[:, None]), _bytes(m[:, None]), _nibbles(q)], 1)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _nibbles(q: Tensor) -> Tensor:
    """q uint8 [32, n] -> [n, 16]"""
    return (q[:16] | q[16:] << 4).t()


def _of_affine_k(levels: int, offsets: Tensor, format: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    def of(x: Tensor, importance: Tensor | None) -> Tensor:
        whole = x.square().mean(1).repeat_interleave(8)
        blocks = x.reshape(-1, 32).t().contiguous()
        v = _costs(blocks, None if importance is None else importance.reshape(-1, 32).t(), whole)
        scale, minimum = _affine(blocks, v, levels, offsets, below_zero=True)
        d, sc = _six_bits(scale.view(-1, 8))
        dmin, mn = _six_bits(-minimum.view(-1, 8))
        wide, wide_min = d.float(), dmin.float()
        # The rounded scales moved what fits best: of a pair and its neighbours, each with the integers that it leads to, the best stays.
        best = torch.full_like(scale, torch.inf)
        chosen_sc, chosen_mn = sc, mn
        for by_scale, by_minimum in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)):
            tried_sc, tried_mn = (sc + by_scale).clamp(0, 63), (mn + by_minimum).clamp(0, 63)
            fine, low = (tried_sc * wide).view(-1), (tried_mn * wide_min).view(-1)
            stored = _rounded(blocks + low, fine, levels).mul_(fine).sub_(low)
            error = (blocks - stored).square_().mul_(v).sum(0)
            better = (error < best).view(-1, 8)
            best = torch.minimum(best, error)
            chosen_sc, chosen_mn = torch.where(better, tried_sc, chosen_sc), torch.where(better, tried_mn, chosen_mn)
        low, fine = (chosen_mn * wide_min).view(-1), (chosen_sc * wide).view(-1)
        q = _rounded(blocks + low, fine, levels).to(torch.uint8).t().reshape(-1, SUPER_BLOCK)
        return join_affine(q, chosen_sc.to(torch.uint8), chosen_mn.to(torch.uint8), torch.cat([d, dmin], 1), format)

    return of


def _six_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(fp16 scale [n, 1], fp32 integers 0..63 [n, 8]) of x >= 0, [n, 8]."""
    d = (x.amax(1, keepdim=True) / 63).half()
    return d, (x * _inverse(d.float())).round().clamp(0, 63)


def _symmetric(x: Tensor, v: Tensor, integers: Callable[[Tensor], Tensor], candidates: list[float]) -> Tensor:
    """scale [n] of x ~ scale q, where q = integers(x / scale), for blocks x [b, n], a column each. candidates: what the element of largest
    magnitude becomes."""
    least, most = x.amin(0), x.amax(0)
    largest = torch.where(-least > most, least, most)
    vx, unit = v * x, x * _inverse(largest)
    scale, best = torch.zeros_like(largest), torch.zeros_like(largest)

    def consider(q: Tensor) -> None:
        nonlocal scale, best
        sum_xq, sum_qq = (vx * q).sum(0), (v * q).mul_(q).sum(0).clamp_(min=_TINY)
        gain = sum_xq * sum_xq / sum_qq  # what the error is less than sum v x**2
        better = gain > best
        scale, best = torch.where(better, sum_xq / sum_qq, scale), torch.where(better, gain, best)

    for candidate in candidates:
        consider(integers(unit * candidate))
    consider(integers(x * _inverse(scale)))
    return scale


def _six_bit_integers(x: Tensor) -> Tensor:
    return x.round_().clamp_(-32, 31)


def _of_q6_k(x: Tensor, importance: Tensor | None) -> Tensor:
    blocks = x.reshape(-1, 16).t().contiguous()
    v = blocks.square() if importance is None else importance.reshape(-1, 16).t()
    candidates = [-32 - 0.1 * k for k in range(-9, 10)]
    scale = _symmetric(blocks, v, _six_bit_integers, candidates).view(-1, 16)
    largest = scale.gather(1, scale.abs().argmax(1, keepdim=True))
    d = (largest / -128).half()
    wide = d.float()
    sc = (scale * _inverse(wide)).round().clamp(-128, 127)
    q = _six_bit_integers(blocks * _inverse((sc * wide).view(-1))) + 32
    return join_q6(q.to(torch.uint8).t().reshape(-1, SUPER_BLOCK), sc.to(torch.int8), _bytes(d))


def _iq4_nl_index() -> Tensor:
    """The nearest entry of the table, int64 [512], by floor(2 y) + 256 of y in -128..128: halfway between two entries is a half."""
    halves = (torch.arange(512, dtype=torch.float32) - 256) / 2
    table = torch.tensor(IQ4_NL, dtype=torch.float32)
    return torch.bucketize(halves, (table[1:] + table[:-1]) / 2, right=True)


def _of_iq4_nl(x: Tensor, importance: Tensor | None) -> Tensor:
    index = _iq4_nl_index().to(x.device)
    values = torch.tensor(IQ4_NL, dtype=torch.float32, device=x.device)[index]

    def place(y: Tensor) -> Tensor:
        return y.mul_(2).floor_().add_(256).clamp_(0, 511).int()

    blocks = x.t().contiguous()
    v = blocks.square() if importance is None else importance.t()
    scale = _symmetric(
        blocks, v, lambda y: values[place(y)], [*(-127.0 + k for k in range(-8, 9)), 113.0, 120.0, 127.0]
    )
    d = scale.half()
    q = index[place(blocks * _inverse(d.float()))].to(torch.uint8)
    return torch.cat([_bytes(d[:, None]), _nibbles(q)], 1)


_OF_FORMAT: dict[str, tuple[int, Callable[[Tensor, Tensor | None], Tensor]]] = {
    "q4_1": (32, _of_q4_1),
    "q4_k": (SUPER_BLOCK, _of_affine_k(15, torch.linspace(-1, 1, 21), "q4_k")),
    "q5_k": (SUPER_BLOCK, _of_affine_k(31, torch.linspace(-0.5, 1, 16), "q5_k")),
    "q6_k": (SUPER_BLOCK, _of_q6_k),
    "iq4_nl": (32, _of_iq4_nl),
}
