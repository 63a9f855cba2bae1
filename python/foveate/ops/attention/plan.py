"""Which native kernel attends, and how it divides the work: pure functions of shapes and thread counts, for attention and for decode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

# Head dims that the blocked kernels take; the decode kernels take more. csrc/contract/attention.h has the same numbers.
CPU_HEAD_DIM = 576
GPU_HEAD_DIM = 256

# Tasks of the CPU's decode kernel. 64 rows of a head dim of 256 take 128 KiB for q and the output, which leaves the L2 cache to K and V.
_MAX_ROWS = 64
_STATE_BYTES = 256 * 1024
_MIN_SPLIT_KEYS = 256
_INVARIANT_SPLIT_KEYS = 2048
_TASKS_PER_THREAD = 4
BLOCKED_ROWS = 48

# Blocks of the CUDA kernel (csrc/cuda/kv_cache/decode.cu): a block takes 16 query rows and at most 256 columns of V.
TILE_ROWS = 16
_SLICE_COLUMNS = 256


class DecodePlan(NamedTuple):
    """How a native kernel divides its work. Only the splits have an influence on the result (by rounding)."""

    num_splits: int
    keys_per_split: int  # 0: each sequence in num_splits equal parts
    rows_per_task: int  # of the Sq * Hq / Hkv query rows that share a KV head
    heads_per_task: int  # KV heads
    blocked: bool  # many queries: the blocked kernel of foveate.attention does the work instead


@functools.lru_cache(maxsize=4096)
def decode_plan(
    B: int, Sq: int, Hq: int, Hkv: int, D: int, Dv: int, max_keys: int, threads: int, num_splits: int, batch_invariant: bool,
    quantized: bool,
) -> DecodePlan:  # fmt: skip
    """A pure function of the shapes, the thread count and the options; max_keys is what the cache can hold for a sequence.

    Tasks are those of `_tasks`. With batch_invariant the splits depend neither on the batch nor on the threads: they are 2048 keys long,
    and the heads are divided instead.
    """
    rows = Sq * (Hq // max(Hkv, 1))
    # A step of one query stays with the decode kernel: it is bound by memory, however many heads share a KV head.
    many = Sq > 1 and rows >= BLOCKED_ROWS and not quantized and max(D, Dv) <= CPU_HEAD_DIM
    if num_splits == 0 and many and not batch_invariant:
        return _BLOCKED
    if num_splits > 0:
        return _tasks(B, rows, Hkv, D, Dv, 0, threads)._replace(num_splits=num_splits)
    if not batch_invariant:
        return _tasks(B, rows, Hkv, D, Dv, max_keys, threads)
    plan = _tasks(B, rows, Hkv, D, Dv, 0, threads)
    if rows > _MAX_ROWS:  # many queries: enough tasks, and partial results would take more memory than the cache
        return plan
    splits = max(1, -(-max_keys // _INVARIANT_SPLIT_KEYS))
    return plan._replace(num_splits=splits, keys_per_split=_INVARIANT_SPLIT_KEYS)


_BLOCKED = DecodePlan(1, 0, 1, 1, True)


def _tasks(B: int, rows: int, Hkv: int, D: int, Dv: int, keys: int, threads: int) -> DecodePlan:
    """How the decode kernel of the CPU divides `rows` query rows of each KV head over `keys` keys, which are not split if there are 0.

    All KV heads of a sequence belong to one task as long as their state fits the L2 cache: in the layout [B, S, H, D] that reads memory
    in order. Keys are split where there would be too few tasks for the threads, heads where the keys are too few for that: to a task a
    thread for one sequence, to several for more, since their lengths may differ.
    """
    rows_per_task = max(1, min(rows, _MAX_ROWS))
    heads_per_task = max(1, min(Hkv, _STATE_BYTES // (rows_per_task * max(D + Dv, 1) * 4)))

    def tasks() -> int:
        return max(1, B * -(-rows // rows_per_task) * -(-Hkv // heads_per_task))

    wanted = _TASKS_PER_THREAD * threads if threads > 1 else 1
    splits = max(1, min(-(-wanted // tasks()), -(-keys // _MIN_SPLIT_KEYS)))
    while heads_per_task > 1 and tasks() * splits < (threads if B == 1 else wanted):
        heads_per_task = -(-heads_per_task // 2)
    return DecodePlan(splits, 0, rows_per_task, heads_per_task, False)


# The blocked kernel attends for prompts, the decode kernel for what is generated; the rows of either are the same however many tokens a
# step has. Who does not say which it is has a prompt from so many tokens on.
_PROMPT_TOKENS = 32


def step_plan(
    B: int, S: int, Hq: int, Hkv: int, D: int, max_keys: int, threads: int, quantized: bool, prompt: bool | None = None
) -> DecodePlan:
    """For a step of `models.NativeDecoder`: the batch-invariant `decode_plan`, but for a prompt."""
    plan = decode_plan(B, S, Hq, Hkv, D, D, max_keys, threads, 0, True, quantized)
    if prompt is None:
        prompt = S >= _PROMPT_TOKENS and S * (Hq // Hkv) >= BLOCKED_ROWS
    if prompt and not quantized and D <= CPU_HEAD_DIM:
        return plan._replace(num_splits=1, keys_per_split=0, blocked=True)
    return plan


# The CPU's decode kernel reads K and V once, in place, where the blocked kernel copies them first: so many query rows that share a KV
# head are few enough for it.
_FEW_ROWS = 16
_PRODUCTS_OF_A_TEAM = 1 << 17  # multiply-adds; less than that takes one thread less time than others need to start


@functools.lru_cache(maxsize=4096)
def attention_plan(
    B: int, Sq: int, Hq: int, Hkv: int, D: int, Dv: int, Skv: int, threads: int, plain: bool
) -> tuple[DecodePlan, int]:
    """For foveate.attention on the CPU: the plan, and how many threads it is for. plain: no option that the decode kernel lacks."""
    team = 1 if B * Hq * Sq * Skv * (D + Dv) < _PRODUCTS_OF_A_TEAM else threads
    rows = Sq * (Hq // max(Hkv, 1))
    if not plain or rows > _FEW_ROWS or B * rows == 0:
        return _BLOCKED, team
    return _tasks(B, rows, Hkv, D, Dv, Skv, team), team


class CudaThresholds(NamedTuple):
    """Where choices for a GPU tip. All are estimates: no GPU has measured both sides of one yet."""

    blocked_queries: int = 64  # from so many on, the blocked kernel attends;
    # so it does from so many query rows on that share a KV head, if it has a block for each SM
    blocked_rows: int = 64
    blocks_per_sm: int = 2  # of the decode kernel, which splits keys where there would be fewer
    min_split_keys: int = 128  # enough to have all keys of a short split under way at once
    max_splits: int = 128


_DEFAULTS = CudaThresholds()
_thresholds = _DEFAULTS


def cuda_thresholds() -> CudaThresholds:
    """Those in force."""
    return _thresholds


@contextlib.contextmanager
def other_cuda_thresholds(**replaced: int) -> Iterator[CudaThresholds]:
    """Within it these thresholds are in force, in all threads: for benchmarks and tests that want both sides of one.

    blocked_queries=1 gives every call to the blocked kernel, blocked_queries=blocked_rows=2**31 none.
    """
    global _thresholds
    before = _thresholds
    _thresholds = before._replace(**replaced)
    try:
        yield _thresholds
    finally:
        _thresholds = before


@functools.lru_cache(maxsize=4096)
def cuda_decode_plan(
    B: int, Sq: int, Hq: int, Hkv: int, D: int, Dv: int, max_keys: int, num_sms: int, num_splits: int, batch_invariant: bool,
    quantized: bool, limits: CudaThresholds = _DEFAULTS,
) -> DecodePlan:  # fmt: skip
    """A pure function for the CUDA kernel and a GPU of num_sms SMs.

    Keys are split where there would be fewer blocks than the GPU has room for, into as many parts as fill it once. With
    batch_invariant the splits are 2048 keys long. Many queries go to the blocked kernel if its blocks, one for each head and 64
    queries or more, are enough to keep the GPU busy.
    """
    rows = Sq * (Hq // max(Hkv, 1))
    if num_splits > 0:
        return DecodePlan(num_splits, 0, TILE_ROWS, 1, False)
    if batch_invariant:
        return DecodePlan(max(1, -(-max_keys // _INVARIANT_SPLIT_KEYS)), _INVARIANT_SPLIT_KEYS, TILE_ROWS, 1, False)
    many = Sq >= limits.blocked_queries or (Sq > 1 and rows >= limits.blocked_rows and B * Hq >= num_sms)
    if many and not quantized and max(D, Dv) <= GPU_HEAD_DIM:
        return DecodePlan(1, 0, TILE_ROWS, 1, True)
    blocks = max(1, B * Hkv * -(-rows // TILE_ROWS) * -(-Dv // _SLICE_COLUMNS))
    splits = min(limits.blocks_per_sm * num_sms // blocks, -(-max_keys // limits.min_split_keys), limits.max_splits)
    return DecodePlan(max(1, splits), 0, TILE_ROWS, 1, False)


def cuda_few_queries(
    B: int, Sq: int, Hq: int, Hkv: int, Skv: int, num_sms: int, limits: CudaThresholds = _DEFAULTS
) -> bool:
    """Whether foveate.attention on a GPU takes the decode kernel: queries so few and keys so many that the blocked kernel, with one block
    for each KV head, would leave SMs idle that splits of the keys can use."""
    rows = Sq * (Hq // max(Hkv, 1))
    return 0 < rows < limits.blocked_rows and 0 < B * Hkv < num_sms and Skv >= 2 * limits.min_split_keys
