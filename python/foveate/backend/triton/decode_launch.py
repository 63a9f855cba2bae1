"""foveate.attention_with_kv_cache on the Triton kernels: append, attend, combine."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.backend.devices import num_sms
from foveate.backend.triton import attention_launch, config

from . import on_device
from .decode import decode_combine, decode_split
from .kv_append import Cache, Rotary, append_rows
from .scores import Options
from .tiles import parts, width

_INVARIANT_SPLIT_KEYS = 2048
_MIN_SPLIT_KEYS = 256
_MAX_SPLITS = 128
_KINDS = {torch.int8: 1, torch.float8_e4m3fn: 2}


class DecodePlan(NamedTuple):
    """How the work is divided. Only the splits have an influence on the result (by rounding)."""

    block_m: int  # query rows of a program: queries times the heads that share a KV head
    block_n: int  # keys that it takes at a time
    num_splits: int
    keys_per_split: int  # 0: each sequence in num_splits equal parts


@functools.lru_cache(maxsize=4096)
def decode_plan(
    B: int, rows: int, Hkv: int, D: int, Dv: int, max_keys: int, num_sms: int, num_splits: int, batch_invariant: bool
) -> DecodePlan:
    """A pure function of the shapes, the number of SMs and the options; max_keys is what the cache can hold.

    Keys are split where there would be fewer than two programs for each SM, into parts of at least 256. With batch_invariant
    the splits are 2048 keys long, whatever the batch.
    """
    widest = max(sum(parts(D)), sum(parts(Dv)))
    block_m = min(64 if widest <= 128 else 16, max(16, 1 << (rows - 1).bit_length()))
    block_n = 64 if widest <= 128 else 32 if widest <= 256 else 16
    if num_splits > 0:
        return DecodePlan(block_m, block_n, num_splits, 0)
    if batch_invariant:
        return DecodePlan(block_m, block_n, max(1, -(-max_keys // _INVARIANT_SPLIT_KEYS)), _INVARIANT_SPLIT_KEYS)
    programs = max(1, B * Hkv * -(-rows // block_m))
    splits = 1 if 10 * programs >= 8 * num_sms else -(-2 * num_sms // programs)
    return DecodePlan(block_m, block_n, max(1, min(splits, -(-max_keys // _MIN_SPLIT_KEYS), _MAX_SPLITS)), 0)


def _cache(data: Tensor, scale: Tensor | None) -> Cache:
    kind = _KINDS.get(data.dtype, 0)
    strides = None if scale is None else scale.expand(data.shape[:-1]).stride()
    per_token = scale is not None and scale.dim() == 3
    bits = data.view(torch.uint8) if kind == 2 else data
    return Cache(bits, data.stride()[:3], scale, strides, tl.constexpr(kind), tl.constexpr(per_token))


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


@on_device
def attention_with_kv_cache(c: Any, out: Tensor, lse: Tensor) -> None:
    """c: `ops.attention.cache_operands.CacheOperands`. Fills out [B, Sq, Hq, Dv] and lse [B, Hq, Sq], and the new rows of the caches."""
    q, k_cache, v_cache, k, v, kv_lens, block_table = c.q, c.k_cache, c.v_cache, c.k, c.v, c.kv_lens, c.block_table
    cos, sin, interleaved, alibi, sinks = c.rotary_cos, c.rotary_sin, c.rotary_interleaved, c.alibi_slopes, c.sinks
    causal, left, right, scale, softcap = c.causal, c.window_left, c.window_right, c.scale, c.softcap
    B, Sq, Hq, D = q.shape
    Hkv, Dv = v_cache.shape[2:]
    if Hkv == 0:  # no heads: nothing is appended and nothing attends
        return
    q_per_kv, page_size, new = Hq // Hkv, k_cache.shape[1], 0 if k is None else k.shape[1]
    half = 0 if cos is None else cos.shape[-1]
    if cos is not None and sin is not None:
        cos, sin = _last_contiguous(cos), _last_contiguous(sin)
        rotary = Rotary(cos, sin, (cos.stride(0), sin.stride(0)), cos.shape[0])
    else:
        rotary = Rotary(None, None, None, None)
    table = None if block_table is None else _last_contiguous(block_table)
    table_stride = 0 if table is None else table.stride(0)
    pages, capacity = k_cache.shape[0], page_size if table is None else page_size * table.shape[1]
    kv_lens = kv_lens.contiguous()
    keys, values = _cache(k_cache, c.k_scale), _cache(v_cache, c.v_scale)
    if k is not None and v is not None and B * new * Hkv > 0:
        k, v = _last_contiguous(k), _last_contiguous(v)
        append_rows[(B * new * Hkv,)](
            k, v, keys, values, k.stride()[:3], v.stride()[:3], kv_lens, table, table_stride, rotary, new, Hkv, page_size, pages, capacity,
            D=D, DV=Dv, HALF=half, INTERLEAVED=interleaved, BLOCK_K=triton.next_power_of_2(D), BLOCK_V=triton.next_power_of_2(Dv),
        )  # fmt: skip
    if out.numel() == 0:
        return
    if causal:
        right = 0 if right < 0 else min(right, 0)
    plan = decode_plan(B, Sq * q_per_kv, Hkv, D, Dv, capacity, num_sms(q.device), c.num_splits, c.batch_invariant)
    part_out = part_lse = None
    if plan.num_splits > 1:
        part_out = torch.empty((plan.num_splits, B, Hq, Sq, Dv), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((plan.num_splits, B, Hq, Sq), dtype=torch.float32, device=q.device)
    none: dict[str, Any] = dict.fromkeys(Options._fields)
    opts = Options(**none)._replace(
        scale=float(scale), scale_log2=scale * math.log2(math.e), softcap=float(softcap) if softcap > 0 else None, kv_lens=kv_lens,
        alibi=None if alibi is None else alibi.contiguous(),
        alibi_stride=None if alibi is None else Hq if alibi.dim() == 2 and alibi.shape[0] > 1 else 0,
        sinks=None if sinks is None else sinks.contiguous(), has_left=tl.constexpr(left >= 0), has_right=tl.constexpr(right >= 0),
        plain=tl.constexpr(False), guarded=tl.constexpr(True),
    )  # fmt: skip
    q = _last_contiguous(q)
    blocks = -(-Sq * q_per_kv // plan.block_m)
    wide = max(D, Dv) > 128
    decode_split[(blocks * B * Hkv, plan.num_splits)](
        q, keys, values, out, lse, part_out, part_lse, q.stride()[:3], out.stride()[:3], table, table_stride, rotary, Hq, Sq, new, blocks,
        page_size, pages, capacity, plan.num_splits, plan.keys_per_split, left, right, opts, width(D), width(Dv),
        Q_PER_KV=q_per_kv, HALF=half, INTERLEAVED=interleaved, APPENDED=k is not None,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, num_warps=8 if wide else 4,
        num_stages=2 if wide or config.shared_memory(attention_launch.arch(q.device)) < 200 << 10 else 3,
    )  # fmt: skip
    if part_out is not None:
        decode_combine[(B * Hq * Sq,)](
            part_out, part_lse, out, lse, opts.sinks, out.stride()[:3], Hq, Sq, B * Hq * Sq, plan.num_splits, DV=Dv,
            BLOCK_V=triton.next_power_of_2(Dv), BLOCK_S=triton.next_power_of_2(plan.num_splits),
        )  # fmt: skip
