"""torch.ops.foveate.attention_with_kv_cache: schema, the backends below it, the division of the work, fake kernel.

`with_kv_cache.py` checks what a call means. A scale tensor has no dimension or [Hkv] (read), or the cache's shape without the last
dimension (one for each token and head, written at append).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.native import _C, num_sms, runs_cuda_kernels
from foveate.backend.reference import attention as reference
from foveate.backend.registry import Query, choose, register
from foveate.ops import library
from foveate.ops.attention.plan import TILE_ROWS, cuda_decode_plan, cuda_thresholds, decode_plan
from foveate.ops.attention.split_counters import counters
from foveate.ops.autograd import each_slice

QUANTIZED = (torch.int8, torch.float8_e4m3fn)
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_SCHEMA = (
    "attention_with_kv_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor kv_lens, "
    "Tensor? block_table, Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, bool causal, "
    "SymInt window_left, SymInt window_right, Scalar scale, float softcap, Tensor? alibi_slopes, Tensor? sinks, "
    "Tensor(c!)? k_scale, Tensor(d!)? v_scale, int num_splits, bool batch_invariant, str backend) -> (Tensor, Tensor)"
)

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


def _rows(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension, copied if need be."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _expanded(scale: Tensor | None, cache: Tensor) -> Tensor | None:
    return scale if scale is None or scale.dim() == 3 else scale.expand(cache.shape[:-1])


def _empty_outputs(q: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    B, Sq, Hq, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((B, Sq, Hq, v_cache.shape[-1])), q.new_empty((B, Hq, Sq), dtype=dtype)


def run(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None, kv_lens: Tensor,
    block_table: Tensor | None, rotary_cos: Tensor | None, rotary_sin: Tensor | None, rotary_interleaved: bool,
    causal: bool, window_left: int, window_right: int, scale: float, softcap: float, alibi_slopes: Tensor | None,
    sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, num_splits: int, batch_invariant: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    chosen = choose("attention_with_kv_cache", Query(q.device.type, q.dtype), backend or None)
    if k is not None and chosen != "reference":
        _bump_version(k_cache)
        _bump_version(v_cache)
        if k_cache.dtype in QUANTIZED:
            for scales in (k_scale, v_scale):
                if scales is not None and scales.dim() == 3:
                    _bump_version(scales)
    if chosen == "reference":
        if block_table is not None:
            block_table = _usable_table(q, k_cache, k, kv_lens, block_table, window_left)
        _check_values(q, k_cache, k, kv_lens, block_table, rotary_cos)
        return reference.attention_with_kv_cache(
            q, k_cache, v_cache, k=k, v=v, kv_lens=kv_lens, block_table=block_table, rotary_cos=rotary_cos,
            rotary_sin=rotary_sin, rotary_interleaved=rotary_interleaved, causal=causal,
            window=(window_left, window_right), scale=scale, softcap=softcap,
            alibi_slopes=alibi_slopes[0] if alibi_slopes is not None and len(alibi_slopes) == 1 else alibi_slopes, sinks=sinks,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
    if chosen == "triton":
        from foveate.backend.triton.decode_launch import attention_with_kv_cache as triton_decode

        if q.is_cpu:  # on a GPU this would wait for the device
            usable = None if block_table is None else _usable_table(q, k_cache, k, kv_lens, block_table, window_left)
            _check_values(q, k_cache, k, kv_lens, usable, rotary_cos)
        out, lse = _empty_outputs(q, v_cache)
        triton_decode(
            q, k_cache, v_cache, k, v, kv_lens, block_table, rotary_cos, rotary_sin, rotary_interleaved, causal,
            window_left, window_right, scale, softcap, alibi_slopes, sinks, k_scale, v_scale, num_splits,
            batch_invariant, out, lse,
        )  # fmt: skip
        return out, lse
    B, Sq, Hq, D = q.shape
    Hkv, Dv = v_cache.shape[2:]
    threads = torch.get_num_threads()
    capacity = k_cache.shape[1] if block_table is None else k_cache.shape[1] * block_table.shape[1]
    on_gpu = runs_cuda_kernels(q.device.type)
    sizes = (B, Sq, Hq, Hkv, D, Dv, capacity)
    wishes = (num_splits, batch_invariant, k_cache.dtype in QUANTIZED)
    if on_gpu:
        plan = cuda_decode_plan(*sizes, num_sms(q.device), *wishes, cuda_thresholds())
    else:
        plan = decode_plan(*sizes, threads, *wishes)
    if on_gpu:  # the kernels read them, as int32
        limits = torch.iinfo(torch.int32)
        kv_lens = kv_lens if kv_lens.dtype == torch.int32 else kv_lens.clamp(limits.min, limits.max).to(torch.int32)
        kv_lens = kv_lens.contiguous()
    out, lse = _empty_outputs(q, v_cache)
    q = _rows(q)  # type: ignore[assignment]
    q_rotated = (
        torch.empty_like(q, memory_format=torch.contiguous_format) if plan.blocked and rotary_cos is not None else None
    )
    partial_out = partial_lse = counted = None
    if plan.num_splits > 1:
        partial_out = q.new_empty((plan.num_splits, B, Hq, Sq, Dv), dtype=torch.float32)
        partial_lse = q.new_empty((plan.num_splits, B, Hq, Sq), dtype=torch.float32)
        if on_gpu:
            counted = counters(q.device, B * Hkv * -(-Sq * (Hq // max(Hkv, 1)) // TILE_ROWS))
    _C.attention_with_kv_cache(  # type: ignore[union-attr]
        q, k_cache, v_cache, _rows(k), _rows(v), kv_lens, out, lse, partial_out, partial_lse, q_rotated, counted, block_table,
        rotary_cos, rotary_sin, rotary_interleaved, _expanded(k_scale, k_cache), _expanded(v_scale, v_cache),
        k_scale is not None and k_scale.dim() == 3, v_scale is not None and v_scale.dim() == 3, alibi_slopes, sinks,
        causal, window_left, window_right, scale, softcap, *plan, threads,
    )  # fmt: skip
    return out, lse


def _bump_version(x: Tensor) -> None:
    """Tells autograd that the kernel is about to write: a backward pass that has saved x raises then, as after copy_."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def _usable_table(
    q: Tensor, k_cache: Tensor, k: Tensor | None, kv_lens: Tensor, block_table: Tensor, left: int
) -> Tensor:
    """The reference reads every key, also those before the window, whose pages may be gone: their entries become the page of the
    first visible key."""
    if left < 0:
        return block_table
    table = block_table.clone()
    for b, n in enumerate(kv_lens.tolist()):
        first = min(max(n + (0 if k is None else k.shape[1]) - q.shape[1] - left, 0), n) // k_cache.shape[1]
        if 0 < first < table.shape[1]:
            table[b, :first] = table[b, first]
    return table


def _check_values(
    q: Tensor, k_cache: Tensor, k: Tensor | None, kv_lens: Tensor, block_table: Tensor | None, rotary_cos: Tensor | None
) -> None:
    """What csrc/ops/kv_cache.cpp checks for the native backend, in the same words."""
    lens, Sq, Snew = kv_lens.tolist(), q.shape[1], 0 if k is None else k.shape[1]
    pages, page_size = k_cache.shape[:2]
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


op = library.define(_SCHEMA, impl=run, fake=_fake)


_WRITTEN = (1, 2, 17, 18)  # k_cache, v_cache, k_scale, v_scale


def _vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    """A call for each slice, which writes to its slices of the caches."""
    if args[3] is not None and any(args[i] is not None and args[i].dim() > 2 and in_dims[i] is None for i in _WRITTEN):
        raise ValueError(
            "vmap of attention_with_kv_cache would write every slice's new keys to the same cache; map k_cache and v_cache too (and "
            "their scales, one for each token), or append outside of vmap"
        )
    return each_slice(op, info.batch_size, args, in_dims)


library.vmap("attention_with_kv_cache", _vmap)
