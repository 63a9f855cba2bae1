"""torch.ops.foveate.attention_with_kv_cache: the backends below it, outputs and workspace, fake kernel and batching rule.

Its arguments are `cache_operands.CacheOperands`; `with_kv_cache.py` checks what a call means, `plan.py` divides the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.devices import num_sms
from foveate.backend.native import _C, runs_cuda_kernels
from foveate.backend.reference import attention as reference
from foveate.backend.registry import Query, choose, register
from foveate.ops import library
from foveate.ops.attention.cache_operands import SCHEMA, WRITTEN, CacheOperands, CacheWorkspace, make
from foveate.ops.attention.plan import TILE_ROWS, DecodePlan, cuda_decode_plan, cuda_thresholds, decode_plan
from foveate.ops.attention.split_counters import counters
from foveate.ops.autograd import each_slice
from foveate.ops.checks import chosen_backend, compute_dtype
from foveate.ops.layout import contiguous_rows

QUANTIZED = (torch.int8, torch.float8_e4m3fn)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_native_shared = native.supports()


def _native_supports(query: Query) -> str | None:
    reason = _native_shared(query)
    if reason is not None:
        return reason
    if query.dtype not in _NATIVE_DTYPES:
        return f"the kernels take {', '.join(map(str, _NATIVE_DTYPES))}, q is {query.dtype}"
    return None


register("attention_with_kv_cache", "native", _native_supports)
register("attention_with_kv_cache", "triton", triton_backend.serves)
register("attention_with_kv_cache", "reference", lambda query: None)


def not_capturable(device: str, dtype: torch.dtype) -> str | None:
    """None, or the sentence why a CUDA graph cannot hold a call of this kind."""
    if choose("attention_with_kv_cache", Query(device, dtype), None) != "reference":
        return None
    return (
        "the reference backend of attention_with_kv_cache, the only one here that serves this call, reads kv_lens on the host, "
        "which a graph cannot hold"
    )


def _empty_outputs(q: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    B, Sq, Hq, _ = q.shape
    return q.new_empty((B, Sq, Hq, v_cache.shape[-1])), q.new_empty((B, Hq, Sq), dtype=compute_dtype(q))


def run(c: CacheOperands) -> tuple[Tensor, Tensor]:
    """out, lse: chooses the backend, allocates what it needs, runs."""
    chosen = chosen_backend("attention_with_kv_cache", c.q, c.backend)
    if c.k is not None and chosen != "reference":
        _bump_versions(c)
    if chosen == "reference":
        return _run_reference(c)
    if chosen == "triton":
        return _run_triton(c)
    return _run_native(c)


def _run_reference(c: CacheOperands) -> tuple[Tensor, Tensor]:
    c = _with_usable_table(c)
    _check_values(c)
    alibi = c.alibi_slopes
    return reference.attention_with_kv_cache(
        c.q, c.k_cache, c.v_cache, k=c.k, v=c.v, kv_lens=c.kv_lens, block_table=c.block_table, rotary_cos=c.rotary_cos,
        rotary_sin=c.rotary_sin, rotary_interleaved=c.rotary_interleaved, causal=c.causal, window=(c.window_left, c.window_right),
        scale=c.scale, softcap=c.softcap, alibi_slopes=alibi[0] if alibi is not None and len(alibi) == 1 else alibi, sinks=c.sinks,
        k_scale=c.k_scale, v_scale=c.v_scale,
    )  # fmt: skip


def _run_triton(c: CacheOperands) -> tuple[Tensor, Tensor]:
    from foveate.backend.triton.decode_launch import attention_with_kv_cache as triton_decode

    if c.q.is_cpu:  # on a GPU this would wait for the device
        _check_values(_with_usable_table(c))
    out, lse = _empty_outputs(c.q, c.v_cache)
    triton_decode(c, out, lse)
    return out, lse


def _run_native(c: CacheOperands) -> tuple[Tensor, Tensor]:
    q = c.q
    on_gpu = runs_cuda_kernels(q.device.type)
    plan = _plan(c, on_gpu)
    if on_gpu:  # the kernels read them, as int32
        limits = torch.iinfo(torch.int32)
        lens = c.kv_lens
        lens = lens if lens.dtype == torch.int32 else lens.clamp(limits.min, limits.max).to(torch.int32)
        c = c._replace(kv_lens=lens.contiguous())
    out, lse = _empty_outputs(q, c.v_cache)
    k, v = c.k, c.v
    if not q.is_contiguous() or (k is not None and v is not None and not (k.is_contiguous() and v.is_contiguous())):
        c = c._replace(
            q=contiguous_rows(q),
            k=None if k is None else contiguous_rows(k),
            v=None if v is None else contiguous_rows(v),
        )
    workspace = _workspace(c, plan, on_gpu)
    _C.attention_with_kv_cache(c, out, lse, workspace, plan, torch.get_num_threads())
    return out, lse


def _plan(c: CacheOperands, on_gpu: bool) -> DecodePlan:
    (B, Sq, Hq, D), (Hkv, Dv) = c.q.shape, c.v_cache.shape[2:]
    capacity = c.k_cache.shape[1] * (1 if c.block_table is None else c.block_table.shape[1])
    quantized = c.k_cache.dtype in QUANTIZED
    if on_gpu:
        return cuda_decode_plan(
            B, Sq, Hq, Hkv, D, Dv, capacity, num_sms(c.q.device), c.num_splits, c.batch_invariant, quantized, cuda_thresholds()
        )  # fmt: skip
    return decode_plan(
        B, Sq, Hq, Hkv, D, Dv, capacity, torch.get_num_threads(), c.num_splits, c.batch_invariant, quantized
    )


_NO_WORKSPACE = CacheWorkspace()


def _workspace(c: CacheOperands, plan: DecodePlan, on_gpu: bool) -> CacheWorkspace:
    q, (B, Sq, Hq, _), (Hkv, Dv) = c.q, c.q.shape, c.v_cache.shape[2:]
    if plan.blocked and c.rotary_cos is not None:
        return CacheWorkspace(q_rotated=torch.empty_like(q, memory_format=torch.contiguous_format))
    if plan.num_splits == 1:
        return _NO_WORKSPACE
    return CacheWorkspace(
        partial_out=q.new_empty((plan.num_splits, B, Hq, Sq, Dv), dtype=torch.float32),
        partial_lse=q.new_empty((plan.num_splits, B, Hq, Sq), dtype=torch.float32),
        counters=counters(q.device, B * Hkv * -(-Sq * (Hq // max(Hkv, 1)) // TILE_ROWS)) if on_gpu else None,
    )


def _bump_versions(c: CacheOperands) -> None:
    """Tells autograd that the kernel is about to write: a backward pass that has saved a cache raises then, as after copy_."""
    written = [c.k_cache, c.v_cache]
    if c.k_cache.dtype in QUANTIZED:
        written += [scales for scales in (c.k_scale, c.v_scale) if scales is not None and scales.dim() == 3]
    for x in written:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def _with_usable_table(c: CacheOperands) -> CacheOperands:
    """The reference reads every key, also those before the window, whose pages may be gone: their entries become the page of the
    first visible key."""
    if c.block_table is None or c.window_left < 0:
        return c
    table, new = c.block_table.clone(), 0 if c.k is None else c.k.shape[1]
    for b, n in enumerate(c.kv_lens.tolist()):
        first = min(max(n + new - c.q.shape[1] - c.window_left, 0), n) // c.k_cache.shape[1]
        if 0 < first < table.shape[1]:
            table[b, :first] = table[b, first]
    return c._replace(block_table=table)


def _check_values(c: CacheOperands) -> None:
    """What csrc/ops/kv_cache.cpp checks for the native backend, in the same words."""
    k, rotary_cos, block_table = c.k, c.rotary_cos, c.block_table
    lens, Sq, Snew = c.kv_lens.tolist(), c.q.shape[1], 0 if k is None else k.shape[1]
    pages, page_size = c.k_cache.shape[:2]
    capacity = page_size if block_table is None else page_size * block_table.shape[1]
    table: Sequence[Sequence[int]] | None = None if block_table is None else block_table.tolist()
    for b, n in enumerate(lens):
        end = n + Snew
        if n < 0:
            raise ValueError(f"kv_lens[{b}] = {n} is negative")
        if end > capacity:
            cure = "shorter sequences" if table is None else "a block_table with more pages"
            raise ValueError(
                f"kv_lens[{b}] + Snew = {n} + {Snew} = {end} exceeds the cache's {capacity} keys; use a larger cache or {cure}"
            )
        if rotary_cos is not None:
            first = n - Sq if k is None else n
            if first < 0:
                raise ValueError(
                    f"kv_lens[{b}] = {n} is less than the {Sq} queries: without k, query i is rotated by position "
                    "kv_lens - Sq + i, which must not be negative"
                )
            last = max(end, first + Sq)
            if last > rotary_cos.shape[0]:
                raise ValueError(
                    f"rotary_cos and rotary_sin have {rotary_cos.shape[0]} positions, sequence {b} needs {last}; "
                    "build them for at least that many"
                )
        for i in range(0 if table is None else -(-end // page_size)):
            page = table[b][i]  # type: ignore[index]
            if not 0 <= page < pages:
                raise ValueError(
                    f"block_table[{b}, {i}] = {page} is not a page: the cache has {pages} pages and sequence {b} needs "
                    f"this entry for its {end} keys"
                )


def _fake(q: Tensor, k_cache: Tensor, v_cache: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return _empty_outputs(q, v_cache)


def attend(*args: Any) -> tuple[Tensor, Tensor]:
    """The implementation of the op, for calls that go straight to it."""
    return run(make(args))


op = library.define(f"attention_with_kv_cache({SCHEMA}) -> (Tensor, Tensor)", impl=attend, fake=_fake)


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """A call for each slice, which writes to its slices of the caches."""
    c, dims = make(args), make(in_dims)
    written = [(getattr(c, name), getattr(dims, name)) for name in WRITTEN]
    if c.k is not None and any(x is not None and x.dim() > 2 and dim is None for x, dim in written):
        raise ValueError(
            "vmap of attention_with_kv_cache would write every slice's new keys to the same cache; map k_cache and v_cache too (and "
            "their scales, one for each token), or append outside of vmap"
        )
    return each_slice(op, info.batch_size, args, in_dims)


library.vmap("attention_with_kv_cache", _vmap)
