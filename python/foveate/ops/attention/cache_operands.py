"""The arguments of torch.ops.foveate.attention_with_kv_cache, listed once: its schema and its binding follow from `CacheOperands`."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from foveate.ops.attention.operands import Scalar, SymInt, schema_of


class CacheOperands(NamedTuple):
    """`with_kv_cache.py` normalises a call to these. What is not given is not used.

    csrc/contract/kv_cache.h has the same list, which a test compares: the compiled module takes this tuple as it is.
    """

    q: Tensor  # [B, Sq, Hq, D]
    k_cache: Tensor  # [B, Smax, Hkv, D], or [pages, page_size, Hkv, D]
    v_cache: Tensor  # the same with Dv
    k: Tensor | None  # [B, Snew, Hkv, D], appended
    v: Tensor | None
    kv_lens: Tensor  # int32 or int64 [B]
    block_table: Tensor | None = None  # int32 [B, max_pages]
    rotary_cos: Tensor | None = None  # [max_pos, rot / 2]
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = False
    causal: bool = True
    window_left: SymInt = -1
    window_right: SymInt = -1
    scale: Scalar = 1.0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # fp32 [B or 1, Hq]
    sinks: Tensor | None = None  # [Hq]
    # fp32, of int8 and fp8 caches: one number, [Hkv] (read), or the cache's shape without the last dimension (written at append)
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    num_splits: int = 0  # 0 for a choice by the shapes
    batch_invariant: bool = False
    backend: str = ""  # "" for the best


WRITTEN = ("k_cache", "v_cache", "k_scale", "v_scale")  # in place, where there is k
SCHEMA = schema_of(CacheOperands, WRITTEN)


def make(values: tuple[Any, ...]) -> CacheOperands:
    """CacheOperands of one tuple in their order, as `operands.make`."""
    return tuple.__new__(CacheOperands, values)


class CacheWorkspace(NamedTuple):
    """Memory that a native kernel needs beside the results."""

    partial_out: Tensor | None = None  # fp32, with splits: [num_splits, B, Hq, Sq, Dv]
    partial_lse: Tensor | None = None  # [num_splits, B, Hq, Sq]
    q_rotated: Tensor | None = None  # with rotary, where the blocked kernel attends: [B, Sq, Hq, D]
    counters: Tensor | None = None  # of the CUDA kernel, with splits: int32, zero before and after a call
