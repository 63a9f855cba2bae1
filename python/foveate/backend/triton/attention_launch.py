"""foveate.attention and attention_varlen on the Triton kernels: what the ops of `ops/attention/op.py` call."""

from __future__ import annotations

import contextvars
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.backend.reference import attention as reference
from foveate.backend.triton import config

from . import on_device
from .attention_backward import attention_dkv, attention_dq
from .attention_dbias import attention_dbias
from .attention_forward import attention_forward
from .attention_forward_hopper import attention_forward_hopper
from .attention_statistics import Rows, attention_rows
from .config import PLAIN, SPECIALIZED
from .scores import Options
from .tiles import Width, width


@functools.lru_cache(maxsize=16)
def arch(device: torch.device) -> int:
    """90 for sm_90; what `config` has for the interpreter and for chips of other makers."""
    if device.type == "cpu":
        return config.INTERPRETER
    if device.type == "xpu":
        return config.XE
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName  # such as gfx942:sramecc+:xnack-
        return config.CDNA if name.startswith("gfx9") else config.RDNA
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _expanded(x: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """x and its strides as if it had `shape`: 0 where it broadcasts."""
    return (None, None) if x is None else (x, x.expand(shape).stride())


@functools.lru_cache(maxsize=64)
def _distance_buckets(
    max_q: int, max_k: int, buckets: int, bidirectional: bool, max_distance: int, device: Any
) -> Tensor:
    """int64 [max_q + max_k]: the bucket of distance t - max_k, for every distance j - (i + L - Sq) that a call can meet."""
    distances = torch.arange(-max_k, max_q, device=device)
    return reference.relative_buckets(distances, buckets, bidirectional, max_distance)


class ScoreMod(NamedTuple):
    """`foveate.attention`'s score_mod and what belongs to it."""

    forward: Any
    backward: Any
    aux: tuple[Tensor, ...]


def options(c: Any, mod: ScoreMod | None = None, *, table_gradient: bool = False) -> Options:
    """c: `ops.attention.op.Operands`."""
    B = c.cu_q.shape[0] - 1 if c.cu_q is not None else c.q.shape[0]
    Hq = c.q.shape[-2]
    shape = (B, Hq, c.max_q, c.max_k)
    bias, bias_strides = _expanded(c.bias, shape)
    mask, mask_strides = _expanded(c.mask, shape)
    rel = rel_buckets = rel_shape = None
    if c.rel_table is not None:
        buckets = _distance_buckets(
            c.max_q, c.max_k, c.rel_table.shape[0], c.rel_bidirectional, c.rel_max_distance, c.q.device
        )
        # [Hq, distances], so that the kernel looks up once for each score: O(Sq + Skv) memory.
        rel, rel_shape = c.rel_table.t().contiguous()[:, buckets], (c.max_q + c.max_k, c.max_k)
        rel_buckets = buckets.to(torch.int32) if table_gradient else None
    softcap = float(c.softcap) if c.softcap > 0 else None
    extras = (
        bias is not None
        or mask is not None
        or c.alibi is not None
        or rel is not None
        or softcap is not None
        or mod is not None
    )
    return Options(
        scale=float(c.scale),
        scale_log2=c.scale * math.log2(math.e),
        softcap=softcap,
        bias=bias,
        bias_strides=bias_strides,
        mask=mask,
        mask_strides=mask_strides,
        alibi=None if c.alibi is None else c.alibi.contiguous(),
        alibi_stride=None if c.alibi is None else Hq if c.alibi.shape[0] > 1 else 0,
        rel=rel,
        rel_buckets=rel_buckets,
        rel_shape=rel_shape,
        sinks=None if c.sinks is None else c.sinks.contiguous(),
        kv_lens=None if c.kv_lens is None else c.kv_lens.contiguous(),
        cu_q=None if c.cu_q is None else c.cu_q.contiguous(),
        cu_k=None if c.cu_k is None else c.cu_k.contiguous(),
        totals=None if c.cu_q is None else (c.q.shape[0], c.k.shape[0]),
        philox=c.philox,
        dropout_threshold=round(c.dropout_p * 2**32) if c.dropout_p > 0 else None,
        dropout_scale=1 / (1 - c.dropout_p) if c.dropout_p > 0 else None,
        score_mod=None if mod is None else mod.forward,
        score_mod_bwd=None if mod is None else mod.backward,
        aux=None if mod is None or not mod.aux else mod.aux,
        has_left=tl.constexpr(c.window_left >= 0),
        has_right=tl.constexpr(c.causal or c.window_right >= 0),
        plain=tl.constexpr(not extras and c.scale > 0),
        guarded=tl.constexpr(mask is not None or bias is not None or mod is not None),
    )


def widths(c: Any) -> tuple[Width, Width]:
    """The kernels' D and DV."""
    halves = c.q.dtype == torch.float32
    return width(c.q.shape[-1], halves), width(c.v.shape[-1], halves)


def window(c: Any) -> tuple[int, int]:
    """left, right with causal in it."""
    right = c.window_right
    if c.causal:
        right = 0 if right < 0 else min(right, 0)
    return c.window_left, right


def strides(x: Tensor) -> tuple[int, int, int]:
    """(batch, head, row) of x [B, S, H, D]; the batch stride of a packed [total, H, D] is 0: its rows are counted from the first."""
    return (0 if x.dim() == 3 else x.stride(0), x.stride(-2), x.stride(-3))


def lse_strides(c: Any) -> tuple[int, int]:
    """(batch, head) of lse [B, Hq, Sq] or [Hq, total_q]."""
    if c.cu_q is not None:
        return 0, c.q.shape[0]
    return c.q.shape[2] * c.q.shape[1], c.q.shape[1]


def takes_descriptors(c: Any, mod: ScoreMod | None) -> bool:
    """Whether `attention_forward_hopper` can serve the call: plain scores, and tensors that TMA can address, in steps of 16 bytes."""
    extras = (c.bias, c.mask, c.alibi, c.rel_table, c.philox, mod)
    if (
        any(x is not None for x in extras)
        or c.softcap > 0
        or c.scale <= 0
        or c.q.dtype == torch.float32
        or c.max_k == 0
    ):
        return False
    if any(D not in (64, 128, 256) for D in (c.q.shape[-1], c.v.shape[-1])):
        return False
    return all(
        x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides(x)) and strides(x)[2] > 0 for x in (c.q, c.k, c.v)
    )


def _with_scratch(launch: Any, *args: Any, **options: Any) -> None:
    """A launch with memory from torch for the descriptors that the kernel makes. triton keeps the allocator in a context variable, so in
    a context of its own the caller's stays what it is."""

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
        launch(*args, **options)

    contextvars.copy_context().run(run)


@on_device
def forward(c: Any, out: Tensor, lse: Tensor | None, mod: ScoreMod | None = None) -> None:
    """Fills out and lse for `ops.attention.op.Operands` whose last dimensions are contiguous."""
    Hq, Hkv, D, Dv = c.q.shape[-2], c.k.shape[-2], c.q.shape[-1], c.v.shape[-1]
    B = c.q.shape[0] if c.cu_q is None else c.cu_q.shape[0] - 1
    if out.numel() == 0 or B == 0 or c.max_q == 0:
        return
    q_per_kv, chip = Hq // Hkv, arch(c.q.device)
    left, right = window(c)
    masked = left >= 0 or right >= 0
    chosen = config.forward(D, Dv, c.q.dtype, c.max_q, chip, masked)
    group = q_per_kv if config.packs(c.max_q, q_per_kv, chosen.block_m) else 1
    descriptors = chosen.variant != PLAIN and group == 1 and takes_descriptors(c, mod)
    if group > 1 or (chosen.variant != PLAIN and not descriptors):
        chosen = config.forward(D, Dv, c.q.dtype, c.max_q * group, chip, masked, False)
    blocks = -(-c.max_q * group // chosen.block_m)
    args = (
        c.q, c.k, c.v, out, lse, strides(c.q), strides(c.k), strides(c.v), strides(out), lse_strides(c),
        Hq, c.max_q, c.max_k, blocks, left, right, options(c, mod),
    )  # fmt: skip
    if descriptors:
        ragged = c.kv_lens is not None or c.cu_q is not None or c.max_k % chosen.block_n != 0
        _with_scratch(
            attention_forward_hopper[(blocks * B * Hq,)], *args, Q_PER_KV=q_per_kv, D=D, DV=Dv, BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n, RAGGED=ragged, SPECIALIZE=chosen.variant == SPECIALIZED, num_warps=chosen.warps,
            num_stages=chosen.stages,
        )  # fmt: skip
        return
    attention_forward[(blocks * B * (Hq // group),)](
        *args, *widths(c), Q_PER_KV=q_per_kv, GROUP=group, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n, num_warps=chosen.warps,
        num_stages=chosen.stages,
    )  # fmt: skip


@on_device
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    c: Any,
    wanted: Any,
    grads: Any,
    mod: ScoreMod | None = None,
) -> tuple[Tensor, ...]:
    """Fills grads: q, k, v, bias, rel_table and sinks in the order of the op. Every sum has one order, so two runs give the same bits."""
    Hq, Hkv, D, Dv = c.q.shape[-2], c.k.shape[-2], c.q.shape[-1], c.v.shape[-1]
    B = c.q.shape[0] if c.cu_q is None else c.cu_q.shape[0] - 1
    dq, dk, dv, dbias, dtable, dsinks = (grad if want else None for grad, want in zip(grads, wanted))
    if out.numel() == 0 or c.k.numel() == 0 or B == 0 or c.max_q == 0 or c.max_k == 0:
        for grad in grads:
            grad.zero_()
        return grads
    opts, q_per_kv = options(c, mod, table_gradient=dtable is not None), Hq // Hkv
    keys_kernel, queries_kernel = config.backward(D, Dv, c.q.dtype, c.max_q, arch(c.q.device))
    dims = widths(c)
    left, right = window(c)
    sizes = (Hq, c.max_q, c.max_k)

    both = c.sinks is not None and dlse is not None
    shape = (*lse.shape[:-1], max(2, lse.shape[-1]))  # so that no stride is 1: see Rows
    lse2, delta, keys_lse2, seed = (
        torch.empty(shape, dtype=lse.dtype, device=lse.device) if use else None for use in (1, 1, both, both)
    )
    rows = Rows(lse2, delta, keys_lse2, seed, (0 if c.cu_q is not None else Hq * shape[-1], shape[-1]))
    block = 64
    blocks = -(-c.max_q // block)
    sink_parts = torch.empty((B * blocks, Hq), dtype=torch.float32, device=lse.device) if c.sinks is not None else None
    attention_rows[(blocks * B * Hq,)](
        out, dout, lse, None if dlse is None else dlse.contiguous(), sink_parts, rows, strides(out), strides(dout), lse_strides(c),
        *sizes, blocks, opts, dims[1], BLOCK_M=block,
    )  # fmt: skip
    if dsinks is not None and sink_parts is not None:
        torch.sum(sink_parts, 0, out=dsinks)

    inputs = (c.q, c.k, c.v, dout)
    input_strides = tuple(strides(x) for x in inputs)
    if dq is not None or dtable is not None:
        m, n, warps, stages, _ = keys_kernel
        blocks, buckets, table_parts = -(-c.max_q // m), 0, None
        if dtable is not None:
            buckets = 1 << (c.rel_table.shape[0] - 1).bit_length()
            table_parts = torch.empty((B * blocks, Hq, buckets), dtype=torch.float32, device=lse.device)
        target = torch.empty_like(c.q) if dq is None else dq
        attention_dq[(blocks * B * Hq,)](
            *inputs, target, table_parts, rows, *input_strides, strides(target), *sizes, blocks, left, right, opts, *dims,
            Q_PER_KV=q_per_kv, BLOCK_M=m, BLOCK_N=n, BUCKETS=buckets, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        if dtable is not None and table_parts is not None:
            dtable.copy_(table_parts.sum(0)[:, : dtable.shape[0]].t())
    if dk is not None or dv is not None:
        m, n, warps, stages, _ = queries_kernel
        blocks = -(-c.max_k // n)
        dk_out, dv_out = torch.empty_like(c.k) if dk is None else dk, torch.empty_like(c.v) if dv is None else dv
        attention_dkv[(blocks * B * Hkv,)](
            *inputs, dk_out, dv_out, rows, *input_strides, strides(dk_out), strides(dv_out), *sizes, blocks, left, right, opts,
            *dims, Q_PER_KV=q_per_kv, BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if dbias is not None:
        m, n, warps, stages, _ = keys_kernel
        blocks_m, blocks_n = -(-c.max_q // m), -(-c.max_k // n)
        nb, nh, nq, nk = dbias.shape
        sum_q, sum_k = nq == 1 < c.max_q, nk == 1 < c.max_k
        shape = (nb, nh, blocks_m if sum_q else c.max_q, blocks_n if sum_k else c.max_k)
        parts_ = torch.empty(shape, dtype=torch.float32, device=lse.device)
        attention_dbias[(nb * nh * blocks_m * blocks_n,)](
            *inputs, parts_, rows, *input_strides, parts_.stride(), B, *sizes, left, right, B // nb, Hq // nh, opts, *dims,
            Q_PER_KV=q_per_kv, SUM_Q=sum_q, SUM_K=sum_k, BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        dbias.copy_(parts_.sum_to_size(dbias.shape))
    return grads
