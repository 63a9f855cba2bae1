"""A case -> what is timed: our function, each peer's on the same numbers in the layout it likes best, and the check of both."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveate
from foveate.bench import cases, roofline
from foveate.bench.check import Checked
from foveate.bench.tolerance import (
    GRADIENT_FACTOR,
    attention_bound,
    attention_forward_floors,
    function_floors,
    linear_floor,
    sum_floor,
)
from foveate.ops.packed_linear import quantize_activations

Call = Callable[[], Any]

# What each bench is timed beside: a name of Workload.peers.
PEERS = {
    "attention": ("sdpa",),
    "backward": ("sdpa",),
    "decode": ("sdpa",),
    "softmax": ("torch",),
    "cross_entropy": ("torch",),
    "linear": ("torch",),
    "overhead": ("sdpa",),
    "memory": ("sdpa",),
}


@dataclass(frozen=True)
class Workload:
    """work: floating-point operations or bytes that one call needs at least; limit: the field of roofline.Limits to hold it against."""

    ours: Call
    peers: dict[str, Call]
    results: Callable[[], list[Checked]]
    work: float = 0.0
    limit: str = ""
    min_sample_seconds: float = 0.0

    @property
    def unit(self) -> str:
        return {"gflops": "GFLOP/s", "gbs": "GB/s", "": ""}[self.limit.rpartition("_")[2]]


def build(bench: str, case: cases.Case, seed: int, quick: bool) -> Workload:
    """The workload of a case of any bench but memory, which runs in processes of its own."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(case, cases.AttentionCase):
        return _backward(case, generator) if bench == "backward" else _attention(case, generator)
    if isinstance(case, cases.DecodeCase):
        return _decode(case, generator, 1 if quick else _copies(case))
    if isinstance(case, cases.RowsCase):
        return _softmax(case, generator) if bench == "softmax" else _cross_entropy(case, generator)
    if isinstance(case, cases.LinearCase):
        return _linear(case, generator, quick)
    if isinstance(case, cases.OverheadCase):
        return _overhead(case, generator)
    raise TypeError(f"{bench} has no workload for a {type(case).__name__}")


def missing_bytes(case: cases.Case) -> int:
    """How much more memory the case needs than half of what is free; 0 if it fits."""
    if not isinstance(case, cases.DecodeCase):
        return 0
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, 2 * _copies(case) * case.cache_bytes - free // 2)


def _random(shape: Sequence[int], dtype: str, generator: torch.Generator) -> Tensor:
    """Normal numbers; beyond 16 M of them they repeat, which saves minutes."""
    out = torch.empty(shape, dtype=cases.DTYPES[dtype])
    flat = out.view(-1)
    block = torch.randn(min(flat.numel(), 1 << 24), generator=generator).to(out.dtype)
    for part in flat.split(block.numel()):
        part.copy_(block[: part.numel()])
    return out


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, D] -> [B, H, S, D], contiguous: torch's own layout."""
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def _exact_heads(x: Tensor) -> Tensor:
    """The first and the last head of [B, H, S, D] in fp64: heads are independent, and two are enough to compare with."""
    return x[:, [0, -1]].double()


def _multiply_add_limit(dtype: str) -> str:
    return "bf16_gflops" if dtype == "bf16" else "fp32_gflops"


def _attention(case: cases.AttentionCase, generator: torch.Generator) -> Workload:
    q, k, v = (_random((case.B, case.S, case.H, case.D), case.dtype, generator) for _ in range(3))
    tq, tk, tv = _heads_first(q, k, v)

    def ours() -> Any:
        return foveate.attention(q, k, v, causal=case.causal)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(tq, tk, tv, is_causal=case.causal)

    def results() -> list[Checked]:
        exact = F.scaled_dot_product_attention(
            _exact_heads(tq), _exact_heads(tk), _exact_heads(tv), is_causal=case.causal
        )
        floor = attention_forward_floors(q, k, v, q.dtype)["out"]
        return [Checked("out", ours().transpose(1, 2)[:, [0, -1]], sdpa()[:, [0, -1]], exact, floor)]

    return Workload(ours, {"sdpa": sdpa}, results, 4.0 * case.D * case.visible, _multiply_add_limit(case.dtype))


def _backward(case: cases.AttentionCase, generator: torch.Generator) -> Workload:
    shape = (case.B, case.S, case.H, case.D)
    q, k, v, g = (_random(shape, case.dtype, generator) for _ in range(4))
    tq, tk, tv, tg = _heads_first(q, k, v, g)
    for x in (q, k, v, tq, tk, tv):
        x.requires_grad_()

    def ours() -> tuple[Tensor, ...]:
        return torch.autograd.grad(foveate.attention(q, k, v, causal=case.causal), (q, k, v), g)

    def sdpa() -> tuple[Tensor, ...]:
        out = F.scaled_dot_product_attention(tq, tk, tv, is_causal=case.causal)
        return torch.autograd.grad(out, (tq, tk, tv), tg)

    def results() -> list[Checked]:
        leaves = [_exact_heads(x.detach()).requires_grad_() for x in (tq, tk, tv)]
        exact = torch.autograd.grad(
            F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=case.causal),
            leaves,
            _exact_heads(tg),
        )
        floors = _gradient_floors(leaves[0], leaves[1], leaves[2], _exact_heads(tg), case.causal, q.dtype)
        return [
            Checked(name, mine.transpose(1, 2)[:, [0, -1]], torchs[:, [0, -1]], right, floors[name], GRADIENT_FACTOR)
            for name, mine, torchs, right in zip(("dq", "dk", "dv"), ours(), sdpa(), exact)
        ]

    # Two matrix products forward, five backward (the scores are computed again), 2 * D operations a pair each.
    return Workload(ours, {"sdpa": sdpa}, results, 14.0 * case.D * case.visible, _multiply_add_limit(case.dtype))


def _gradient_floors(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, causal: bool, dtype: torch.dtype
) -> dict[str, float]:
    """Error bounds of dq, dk and dv of [B, H, S, D]: the largest of all heads, one at a time to save memory, in fp32 as a bound may be."""
    floors = {"dq": 0.0, "dk": 0.0, "dv": 0.0}
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        one = [x.detach()[b, h].float()[None, :, None] for x in (q, k, v, dout)]
        scores = q.shape[-1] ** -0.5 * one[0][0, :, 0] @ one[1][0, :, 0].T
        if causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
        bound = attention_bound(*one[:3], scores.softmax(-1)[None, None], dtype=dtype, dout=one[3])
        floors = {name: max(floor, getattr(bound, name)) for name, floor in floors.items()}
    return floors


def _copies(case: cases.DecodeCase) -> int:
    """Copies of the cache to rotate over, so that no call finds its keys in the CPU's caches."""
    return -(-4 * roofline.last_cache_bytes() // case.cache_bytes)


def _decode(case: cases.DecodeCase, generator: torch.Generator, copies: int) -> Workload:
    q = _random((case.B, 1, case.Hq, case.D), case.dtype, generator)
    k, v = (_random((case.B, case.S, case.Hkv, case.D), case.dtype, generator) for _ in range(2))
    (tq,) = _heads_first(q)
    kv_lens = torch.full((case.B,), case.S, dtype=torch.int32)
    caches = [(k, v), *((k.clone(), v.clone()) for _ in range(copies - 1))]
    torch_caches = [_heads_first(k, v) for k, v in caches]

    def ours(k: Tensor, v: Tensor) -> Any:
        return foveate.attention_with_kv_cache(q, k, v, kv_lens=kv_lens)

    def sdpa(k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(tq, k, v, enable_gqa=True)

    def results() -> list[Checked]:
        rows = [0, -1]
        tk, tv = torch_caches[0]
        exact = F.scaled_dot_product_attention(tq[rows].double(), tk[rows].double(), tv[rows].double(), enable_gqa=True)
        floor = attention_forward_floors(q[rows], k[rows], v[rows], q.dtype)["out"]
        return [Checked("out", ours(k, v).transpose(1, 2)[rows], sdpa(tk, tv)[rows], exact, floor)]

    return Workload(
        _rotating(ours, caches), {"sdpa": _rotating(sdpa, torch_caches)}, results, case.cache_bytes, "read_gbs"
    )


def _rotating(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Call:
    turns: Iterator[tuple[Any, ...]] = itertools.cycle(arguments)
    return lambda: function(*next(turns))


def _softmax(case: cases.RowsCase, generator: torch.Generator) -> Workload:
    x = _random((case.rows, case.cols), case.dtype, generator)
    few = slice(0, 16)

    def ours() -> Tensor:
        return foveate.softmax(x)

    def peer() -> Tensor:
        return torch.softmax(x, -1)

    def results() -> list[Checked]:
        (floor,) = function_floors(lambda x: [x.softmax(-1)], [x[few].double()], case.cols, x.dtype, products=False)
        return [Checked("out", ours()[few], peer()[few], torch.softmax(x[few].double(), -1), floor)]

    return Workload(ours, {"torch": peer}, results, 2.0 * case.bytes, "copy_gbs")


def _cross_entropy(case: cases.RowsCase, generator: torch.Generator) -> Workload:
    x = _random((case.rows, case.cols), case.dtype, generator)
    target = torch.randint(case.cols, (case.rows,), generator=generator)
    few = slice(0, 16)
    if not case.gradient:

        def loss() -> Tensor:
            return foveate.cross_entropy(x, target)

        def torch_loss() -> Tensor:
            return F.cross_entropy(x, target)

        def losses() -> list[Checked]:
            exact = F.cross_entropy(x.double(), target)
            return [Checked("loss", loss(), torch_loss(), exact, sum_floor(case.rows, float(exact), x.dtype))]

        return Workload(loss, {"torch": torch_loss}, losses, case.bytes, "read_gbs")

    x.requires_grad_()

    def ours() -> Tensor:
        return torch.autograd.grad(foveate.cross_entropy(x, target), x)[0]

    def peer() -> Tensor:
        return torch.autograd.grad(F.cross_entropy(x, target), x)[0]

    def results() -> list[Checked]:
        def exact(x: Tensor) -> list[Tensor]:
            rows = x.detach().requires_grad_()
            mean = F.cross_entropy(rows, target[few], reduction="sum") / case.rows
            return list(torch.autograd.grad(mean, rows))

        rows = x.detach()[few].double()
        (floor,) = function_floors(exact, [rows], case.cols, x.dtype, products=False)
        return [Checked("dlogits", ours()[few], peer()[few], exact(rows)[0], floor, GRADIENT_FACTOR)]

    # Read forward, read backward, written once.
    return Workload(ours, {"torch": peer}, results, 3.0 * case.bytes, "copy_gbs")


def _linear(case: cases.LinearCase, generator: torch.Generator, quick: bool) -> Workload:
    x = _random((case.rows, case.inner), case.dtype, generator)
    weight = _random((case.outer, case.inner), case.dtype, generator)
    linear = torch.nn.Linear(case.inner, case.outer, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer = foveate.nn.PackedLinear.from_linear(linear, case.format)
    many = 1 if quick or case.rows > 1 else -(-4 * roofline.last_cache_bytes() // layer.nbytes)
    layers = [
        layer,
        *(copy.deepcopy(layer) for _ in range(many - 1)),
    ]  # so that no call finds its weight in the CPU's caches

    def peer() -> Tensor:
        return F.linear(x, weight)

    def results() -> list[Checked]:
        # What the rounding of x to int8 costs is part of a format; the sums are not.
        exact, seen = layer.dequantize(), x
        if case.format not in ("f32", "bf16"):
            q, dx = quantize_activations(x)
            seen = (q * dx[..., None]).flatten(-2)
        floor = linear_floor(seen, exact)
        peer_out = F.linear(seen, exact.to(x.dtype))
        return [Checked("out", layer(x), peer_out, F.linear(seen.double(), exact.double()), floor)]

    ours = _rotating(lambda layer: layer(x), [(layer,) for layer in layers])
    if case.rows == 1:
        return Workload(ours, {"torch": peer}, results, layer.nbytes, "read_gbs")
    work = 2.0 * case.rows * case.inner * case.outer
    return Workload(ours, {"torch": peer}, results, work, _multiply_add_limit(case.dtype))


def _overhead(case: cases.OverheadCase, generator: torch.Generator) -> Workload:
    q, k, v = (_random((1, 1, case.H, case.D), case.dtype, generator) for _ in range(3))
    tq, tk, tv = _heads_first(q, k, v)
    kv_lens = torch.ones(1, dtype=torch.int32)
    for x in (q, k, v, tq, tk, tv):
        x.requires_grad_(case.gradient)

    def ours() -> Any:
        if case.op == "attention_with_kv_cache":
            return foveate.attention_with_kv_cache(q, k, v, kv_lens=kv_lens)
        return foveate.attention(q, k, v)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(tq, tk, tv)

    def results() -> list[Checked]:
        floor = attention_forward_floors(q.detach(), k.detach(), v.detach(), q.dtype)["out"]
        return [Checked("out", ours().detach().transpose(1, 2), sdpa().detach(), tv.detach().double(), floor)]

    return Workload(ours, {"sdpa": sdpa}, results, min_sample_seconds=0.005)
