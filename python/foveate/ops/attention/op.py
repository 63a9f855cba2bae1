"""torch.ops.foveate.attention_forward and attention_backward: outputs and workspaces, the backends below them, fake kernels.

Their arguments are `operands.Operands`; autograd.py has the gradients and the way from a call to these ops, vmap.py the batching rules.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.backend.devices import num_sms
from foveate.backend.native import _C, runs_cuda_kernels
from foveate.backend.reference import attention as reference
from foveate.ops import library
from foveate.ops.attention import (
    definition,
    supports,  # noqa: F401  # registers itself
)
from foveate.ops.attention.cache_operands import CacheOperands
from foveate.ops.attention.operands import DIFFERENTIABLE, SCHEMA, Gradients, Operands, chosen, make, used
from foveate.ops.attention.plan import DecodePlan, attention_plan, cuda_few_queries, cuda_thresholds
from foveate.ops.checks import compute_dtype
from foveate.ops.layout import contiguous_rows

_EMULATED = runs_cuda_kernels("cpu")
_runs = 0


def runs() -> int:
    """Forward passes on real tensors since the import, those of compiled graphs included."""
    return _runs


def forward(c: Operands, need_lse: bool = True) -> tuple[Any, ...]:
    """out, lse (None if need_lse is False): chooses the backend, allocates the outputs, runs."""
    global _runs
    _runs += 1
    q, k, v = c.q, c.k, c.v
    if c.cu_q is None and (c.max_q != q.shape[1] or c.max_k != k.shape[1]):
        # A graph of torch.jit.trace keeps the lengths that it was traced with.
        c = c._replace(max_q=q.shape[1], max_k=k.shape[1])
    backend = chosen("attention", c)
    if backend == "reference":
        with torch.no_grad(), torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
            return tuple(x.contiguous() for x in definition.forward(c))
    out, lse, buckets = empty_out(q, v), empty_lse(q, c.cu_q) if need_lse else None, None
    if backend == "triton":
        from foveate.backend.triton.attention_launch import forward as triton_forward

        triton_forward(checked_rows(c), out, lse)
        return out, lse
    if not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous()):
        c = with_rows(c)
    if c.rel_table is not None:
        buckets = _buckets_of(c)
    if _EMULATED or not q.is_cpu:
        c = _with_int32_lengths(c)
        if _divides_keys(c):
            return _few_query_attention(c)
    _C.attention_forward(c, buckets, out, lse, *_plan(c))
    return out, lse


def _plan(c: Operands) -> tuple[DecodePlan, int]:
    """How a CPU kernel divides the work, and among how many threads; the CUDA kernels divide by their tiles."""
    q = c.q
    shape = q.shape
    B = shape[0] if c.cu_q is None else c.cu_q.shape[0] - 1
    plain = c.cu_q is None and c.rel_table is None and c.dropout_p == 0 and q.dtype is not torch.float64
    return attention_plan(
        B, c.max_q, shape[-2], c.k.shape[-2], shape[-1], c.v.shape[-1], c.max_k, torch.get_num_threads(), plain
    )


# What the CUDA kernel that divides the keys among its blocks knows; a call with any other option keeps the blocked kernel.
_OF_FEW_QUERIES = frozenset(("alibi_slopes", "sinks", "kv_lens", "causal", "window", "softcap"))


def _divides_keys(c: Operands) -> bool:
    """Whether that kernel serves this call, which has few queries."""
    if not _OF_FEW_QUERIES.issuperset(name for name, use in used(c)._asdict().items() if use):
        return False
    (B, Sq, Hq, _), (_, Skv, Hkv, _) = c.q.shape, c.k.shape
    return Hkv > 0 and cuda_few_queries(B, Sq, Hq, Hkv, Skv, num_sms(c.q.device), cuda_thresholds())


def _few_query_attention(c: Operands) -> tuple[Tensor, Tensor]:
    """k and v as a cache that holds all keys."""
    from foveate.ops.attention import with_kv_cache_op as kv_cache_op

    kv_lens = c.kv_lens
    if kv_lens is None:
        kv_lens = torch.full((c.q.shape[0],), c.k.shape[1], dtype=torch.int32, device=c.q.device)
    return kv_cache_op.run(
        CacheOperands(
            c.q, c.k, c.v, None, None, kv_lens, causal=c.causal, window_left=c.window_left, window_right=c.window_right, scale=c.scale,
            softcap=c.softcap, alibi_slopes=c.alibi, sinks=c.sinks, backend="native",
        )
    )  # fmt: skip


def backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, c: Operands, wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`Gradients`; an empty tensor for those that `wanted` leaves out."""
    if c.cu_q is None:
        c = c._replace(max_q=c.q.shape[1], max_k=c.k.shape[1])
    backend = chosen("attention_backward", c)
    if backend == "reference":
        return definition.backward(dout, dlse, c, wanted)
    if backend == "triton":
        from foveate.backend.triton.attention_launch import backward as triton_backward

        return triton_backward(contiguous_rows(dout), dlse, out, lse, checked_rows(c), wanted, empty_grads(c, wanted))
    want, grads = Gradients(*wanted), Gradients(*empty_grads(c, wanted))
    filled = Gradients(*(grad if asked else None for grad, asked in zip(grads, wanted)))
    if want.bias and c.bias is not None:
        # The kernel sums the gradient of bias in the accumulation dtype, in the shape that bias has itself.
        filled = filled._replace(bias=torch.empty(c.bias.shape, dtype=lse.dtype, device=c.q.device))
    buckets = None if c.rel_table is None else _buckets_of(c)
    if runs_cuda_kernels(c.q.device.type):
        c = _with_int32_lengths(c)
    workspace = functools.partial(torch.empty, dtype=torch.int8, device=c.q.device)
    _C.attention_backward(
        with_rows(c), buckets, contiguous_rows(dout), None if dlse is None else _like_new(dlse), out, _like_new(lse), filled, workspace,
        torch.get_num_threads(),
    )  # fmt: skip
    if filled.bias is not None and c.bias is not None:
        grads = grads._replace(bias=filled.bias.to(c.bias.dtype))
    return tuple(grads)


def with_rows(c: Operands) -> Operands:
    """c with q, k and v of contiguous last dimensions."""
    q, k, v = contiguous_rows(c.q), contiguous_rows(c.k), contiguous_rows(c.v)
    return c if q is c.q and k is c.k and v is c.v else c._replace(q=q, k=k, v=v)


def checked_rows(c: Operands) -> Operands:
    """`with_rows` for the Triton kernels, which cannot raise: lengths are checked where that needs no wait for the device."""
    if c.q.is_cpu:
        definition.check_lengths(c)
    return with_rows(c)


def _like_new(x: Tensor) -> Tensor:
    """x with the strides that torch.empty would give it; contiguous() leaves odd ones in dimensions of size 1."""
    return x.reshape(-1).view(x.shape) if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _with_int32_lengths(c: Operands) -> Operands:
    """What the CUDA kernels read: a conversion there, where a check of the values would force a device sync."""
    if c.kv_lens is None and c.cu_q is None:
        return c
    kv_lens, cu_q, cu_k = (None if x is None else x.to(torch.int32) for x in (c.kv_lens, c.cu_q, c.cu_k))
    return c._replace(kv_lens=kv_lens, cu_q=cu_q, cu_k=cu_k)


def _buckets_of(c: Operands) -> Tensor:
    rel_table: Any = c.rel_table
    return _buckets(c.max_q, c.max_k, rel_table.shape[0], c.rel_bidirectional, c.rel_max_distance, c.q.device)


@functools.lru_cache(maxsize=64)
def _buckets(max_q: int, max_k: int, buckets: int, bidirectional: bool, max_distance: int, device: Any) -> Tensor:
    """int32 [max_q + max_k - 1]; entry t is the bucket of distance t - (max_k - 1), key position minus query position."""
    distances = torch.arange(1 - max_k, max(max_q, 1 - max_k), device=device)
    return reference.relative_buckets(distances, buckets, bidirectional, max_distance).to(torch.int32)


# Shapes and strides of the results: of the allocations above and of the fake kernels.


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    shape, Dv = q.shape, v.shape[-1]
    if shape[-1] == Dv and q.is_contiguous():
        return torch.empty_like(q)
    return torch.empty((*shape[:-1], Dv), dtype=q.dtype, device=q.device)


def empty_lse(q: Tensor, cu_q: Tensor | None) -> Tensor:
    shape = q.shape
    rows = (shape[0], shape[2], shape[1]) if cu_q is None else (shape[1], shape[0])
    return torch.empty(rows, dtype=compute_dtype(q), device=q.device)


def empty_grads(c: Operands, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    operands: list[Any] = [c[i] for i in DIFFERENTIABLE]
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if want else c.q.new_empty(0)
        for x, want in zip(operands, wanted, strict=True)
    )


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    c = make(args)
    return empty_out(c.q, c.v), empty_lse(c.q, c.cu_q)


attention_forward = library.define(
    f"attention_forward({SCHEMA}) -> (Tensor, Tensor)", impl=lambda *args: forward(make(args)), fake=_fake_forward
)
attention_backward = library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {SCHEMA}, bool[] wanted) -> "
    f"({', '.join('Tensor' for _ in Gradients._fields)})",
    impl=lambda dout, dlse, out, lse, *args: backward(dout, dlse, out, lse, make(args[:-1]), args[-1]),
    fake=lambda dout, dlse, out, lse, *args: empty_grads(make(args[:-1]), args[-1]),
)
