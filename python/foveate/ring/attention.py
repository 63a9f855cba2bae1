"""Ring attention: attention over a sequence whose tokens are spread over the processes of a torch.distributed group.

Each rank keeps its queries; keys and values travel round the ring, one hop a step, and the next ones are on their way while the present
ones are attended to. The parts are put together by `merge_attention`. The backward pass goes round again, and the gradients of keys and
values travel with them, back home at the end. Liu, Zaharia, Abbeel 2023, arXiv 2310.01889.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from foveate.ops.attention import arguments as checks
from foveate.ops.attention import op as attention_op
from foveate.ops.attention.dense import attention, merge_attention
from foveate.ops.attention.operands import DTYPES, Gradients, Operands
from foveate.ops.checks import compute_dtype
from foveate.ring.layout import Block, block, by_sequence, check_layout, spans

_OF_QKV = list(Gradients(q=True, k=True, v=True, bias=False, rel_table=False, sinks=False))
_NOT_SPREAD = {
    "bias": "no rank has the scores' other columns",
    "mask": "no rank has the scores' other columns",
    "relative_bias": "its buckets would be counted within each part",
    "alibi_slopes": "its distances would be counted within each part",
    "score_mod": "its positions would be counted within each part",
    "score_mod_bwd": "there is no score_mod",
    "score_mod_aux": "there is no score_mod",
    "kv_lens": "the sequences are split where they are, so they need one length; pad causal ones at their end, or pack them: cu_seqlens",
    "dropout_p": "the mask is drawn by positions within one call; set the attention's dropout to 0",
    "generator": "there is no dropout",
}


@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Any
) -> Tensor | tuple[Tensor, Tensor]: ...
def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **refused: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of the whole sequence, of which each of the n ranks of `group` holds a part: queries, keys and values.

    q: [B, Sq, Hq, D]; k: [B, Skv, Hkv, D]; v: [B, Skv, Hkv, Dv], this rank's tokens, the whole having n * Sq and n * Skv. Every rank has
    the same shapes, dtype and options, and calls in the same order, also in its backward pass. Returns this rank's out [B, Sq, Hq, Dv],
    or (out, lse [B, Hq, Sq]) with return_lse; lse is over all keys, without the sink, differentiable.

    layout: which tokens a rank holds; `ring.split_sequence` gives them. "zigzag" (2n chunks, rank r holds chunks r and
    2n - 1 - r; Sq and Skv even) has the same work on each rank when causal; "contiguous" (chunk r of n) sends keys no further than a
    window reaches.
    causal, window, scale, softcap, sinks [Hq], backend: as in `attention`, positions counting in the whole sequence. The other options of
    `attention` are refused. Gradients of sinks are of this rank's queries: sum them over the group, like those of any other parameter.
    cu_seqlens: the whole is one row (B = 1, Sq = Skv) of packed sequences that see nothing of each other; sequence i lies at
    cu_seqlens[i] to cu_seqlens[i + 1], from 0 to n * Sq, anywhere on the ranks. Numbers on the host; a tensor on a GPU is copied there.

    Sums are in fp32 (fp64 for fp64) and in a fixed order, so a repeated call gives the same bits. Each part's result and gradients are
    rounded to q's dtype before. Memory: this rank's tokens, twice their keys and values, and in the backward pass two fp32 gradients of
    them. Differentiable once.

    group: None for all processes. On the CPU every call compares the shapes and options of the ranks; elsewhere that would wait for the
    device, so only the first call with these shapes and options does.

    Raises ValueError or TypeError for arguments that do not fit or differ between ranks, UnsupportedError as `attention`.
    """
    _refuse(refused)
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "ring_attention needs torch.distributed: call torch.distributed.init_process_group, under torchrun for instance"
        )
    check_layout(layout)
    B, Sq, Skv, Hq, D = checks.check_dense(q, k, v)
    q, k, v = checks.same_kind(q, k, v)
    left, right = (-1, -1) if window is None else checks.check_window(window)
    options = _Options(
        left,
        0 if causal else right,
        D**-0.5 if scale is None else checks.check_scale(scale),
        0.0 if softcap is None else checks.check_softcap(softcap),
        backend,
    )
    ends = None if cu_seqlens is None else _check_sequences(cu_seqlens, B, Sq, Skv, dist.get_world_size(group))
    ring = _ring(group, dist.get_rank(group), dist.get_world_size(group), layout, Sq, Skv, options, ends)
    recording = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    # elsewhere than on the CPU each new set of sequences would be compared, and remembered
    checksum = zlib.crc32(repr(ends).encode()) if q.device.type == "cpu" else 0
    facts = [*q.shape, *k.shape, v.shape[-1], *options[:4], layout == "zigzag", recording, checksum]
    ring.compare(q.device, [DTYPES.index(q.dtype), *facts])
    out, lse = _RingAttention.apply(q, k, v, ring)
    if sinks is not None:
        sinks = checks.check_sinks(sinks, q, Hq)[:, None]
        # exp(lse) / (exp(lse) + exp(sink)); a row without keys stays 0 whatever the sink
        kept = torch.sigmoid(torch.where(lse.isneginf(), lse, lse - sinks))
        out = (out * kept.mT[..., None]).to(out.dtype)
    return (out, lse) if return_lse else out


def _check_sequences(cu_seqlens: Sequence[int] | Tensor, B: int, Sq: int, Skv: int, size: int) -> tuple[int, ...]:
    ends = tuple(int(x) for x in (cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens))
    if B != 1 or Sq != Skv:
        raise ValueError(
            f"packed sequences are one row of queries and keys, B = 1 and Sq = Skv; here B={B}, Sq={Sq}, Skv={Skv}"
        )
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != size * Sq or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"cu_seqlens={list(ends[:8])}{'...' if len(ends) > 8 else ''} must rise from 0 to {size * Sq}, the {Sq} tokens of each of "
            f"{size} ranks"
        )
    return ends


def _refuse(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in _NOT_SPREAD:
            raise TypeError(f"ring_attention has no option {name!r}")
        if value is not None and value != () and not (name == "dropout_p" and value == 0):
            raise ValueError(f"ring_attention does not take {name}: {_NOT_SPREAD[name]}")


class _Options(NamedTuple):
    left: int  # -1: unlimited
    right: int
    scale: float
    softcap: float
    backend: str | None


_FACTS = ("dtype", "B", "Sq", "Hq", "D", "B of k", "Skv", "Hkv", "D of k", "Dv", "window left", "window right (0: causal)", "scale",
          "softcap", "zigzag", "gradients recorded", "checksum of cu_seqlens")  # fmt: skip


_compared: set[tuple[Any, ...]] = set()


class _Ring:
    """Who sends what to whom, and which blocks each step computes, for one shape."""

    def __init__(
        self, group: dist.ProcessGroup | None, rank: int, size: int, layout: str, Sq: int, Skv: int, options: _Options,
        ends: tuple[int, ...] | None,
    ) -> None:  # fmt: skip
        self.group, self.options, self.rank, self.size = group, options, rank, size
        if self.rank < 0:
            raise ValueError("this process is not a member of the group given to ring_attention")
        self.offset = self.size * (Skv - Sq)
        self.rows, self.keys = (
            [by_sequence(spans(r, size, length, layout), ends) for r in range(size)] for length in (Sq, Skv)
        )
        used = [s for s in range(self.size) if any(self._blocks(r, (r - s) % self.size) for r in range(self.size))]
        self.steps = used[-1] + 1 if used else 1

    def _blocks(self, rank: int, owner: int) -> list[Block]:
        pairs = [
            block(rows, keys, self.offset, self.options.left, self.options.right)
            for sequence, rows in self.rows[rank]
            for other, keys in self.keys[owner]
            if sequence == other
        ]
        return [pair for pair in pairs if pair is not None]

    def owner(self, step: int) -> int:
        """Whose keys this rank has at a step."""
        return (self.rank - step) % self.size

    def blocks(self, step: int) -> list[Block]:
        return self._blocks(self.rank, self.owner(step))

    def compare(self, device: torch.device, facts: list[float]) -> None:
        """ValueError where the ranks' calls differ: without it they would wait for each other's messages for ever."""
        key = (self.group, *facts)
        if self.size == 1 or (device.type != "cpu" and key in _compared):
            return
        mine = torch.tensor(facts, dtype=torch.float64, device=device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        table = [x.tolist() for x in everyone]
        for rank, row in enumerate(table):
            differing = [f"{name} {a:g} and {b:g}" for name, a, b in zip(_FACTS, table[0], row) if a != b]
            if differing:
                raise ValueError(
                    f"ranks 0 and {rank} of the group call ring_attention with different arguments: "
                    f"{'; '.join(differing)}. All ranks need the same (dtype is the place in {DTYPES})"
                )
        _compared.add(key)

    def exchange(self, tensors: tuple[Tensor, ...], to: int, source: int) -> _Arriving:
        """Starts sending to rank `to` of the group, and receiving tensors of the same shapes from rank `source`."""
        buffers = tuple(torch.empty_like(x) for x in tensors)
        peers = [r if self.group is None else dist.get_global_rank(self.group, r) for r in (to, source)]
        ops = [dist.P2POp(dist.isend, x, peers[0], self.group) for x in tensors]
        ops += [dist.P2POp(dist.irecv, x, peers[1], self.group) for x in buffers]
        return _Arriving(dist.batch_isend_irecv(ops), tensors, buffers)

    def pass_on(self, tensors: tuple[Tensor, ...]) -> _Arriving:
        return self.exchange(tensors, (self.rank + 1) % self.size, (self.rank - 1) % self.size)

    def send_home(self, tensors: tuple[Tensor, ...]) -> _Arriving:
        """From the last step's holder of each rank's keys to that rank."""
        return self.exchange(tensors, self.owner(self.steps - 1), (self.rank + self.steps - 1) % self.size)


# the layers of a model make the same call
_ring = functools.lru_cache(maxsize=8)(_Ring)


class _Arriving(NamedTuple):
    requests: list[dist.Work]
    sent: tuple[Tensor, ...]  # held until they have left
    buffers: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        for request in self.requests:
            request.wait()
        return self.buffers


class _RingAttention(torch.autograd.Function):
    """out, lse of this rank's queries over everyone's keys."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
        acc = compute_dtype(q)
        out = q.new_zeros((*q.shape[:3], v.shape[-1]), dtype=acc)
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=acc)
        scale, softcap, backend = ring.options[2:]
        held: tuple[Tensor, ...] = (k.contiguous(), v.contiguous())
        for step in range(ring.steps):
            arriving = ring.pass_on(held) if step + 1 < ring.steps else None
            for rows, keys, window in ring.blocks(step):
                part, part_lse = attention(
                    q[:, rows], held[0][:, keys], held[1][:, keys],
                    window=window, scale=scale, softcap=softcap, return_lse=True, backend=backend,
                )  # fmt: skip
                out[:, rows], lse[..., rows] = merge_attention(out[:, rows], lse[..., rows], part.to(acc), part_lse)
            held = arriving.wait() if arriving else held
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        ring, acc = ctx.ring, lse.dtype
        dout = torch.zeros_like(out) if dout is None else dout
        dq = torch.zeros_like(q, dtype=acc, memory_format=torch.contiguous_format)
        held: tuple[Tensor, ...] = (k.contiguous(), v.contiguous())
        sums: _Arriving | None = None
        for step in range(ring.steps):
            arriving = ring.pass_on(held) if step + 1 < ring.steps else None
            dk, dv = (torch.zeros_like(x, dtype=acc) for x in held)
            for rows, keys, window in ring.blocks(step):
                parts = _block_gradients(
                    dout[:, rows].contiguous(),
                    None if dlse is None else dlse[..., rows].contiguous(),
                    out[:, rows].contiguous(),
                    lse[..., rows].contiguous(),
                    (q[:, rows], held[0][:, keys], held[1][:, keys]),
                    window,
                    ring.options,
                )
                for total, part in zip((dq[:, rows], dk[:, keys], dv[:, keys]), parts):
                    total += part
            if sums is not None:  # of these keys, by the ranks that they have passed
                for total, part in zip((dk, dv), sums.wait()):
                    total += part
            if step + 1 < ring.steps:
                sums = ring.pass_on((dk, dv))
            elif ring.steps > 1:
                dk, dv = ring.send_home((dk, dv)).wait()
            held = arriving.wait() if arriving else held
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _block_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    window: tuple[int, int],
    options: _Options,
) -> tuple[Tensor, ...]:
    """dq, dk, dv of one block, where out and lse are over all keys: exp(s - lse) are then the block's columns of the whole softmax,
    and the kernels ask for nothing else."""
    q, k, _ = qkv
    left, right = window
    operands = Operands(
        *qkv, max_q=q.shape[1], max_k=k.shape[1], window_left=left, window_right=right, scale=options.scale,
        softcap=options.softcap, deterministic=True, backend=options.backend or "",
    )  # fmt: skip
    if attention_op.chosen("attention_backward", operands) == "reference":
        # It runs its own forward, over the block's keys alone, so it gets the gradients of that: out = sum of weight * part
        part, part_lse = attention_op.attention_forward(*operands)
        weight = torch.where(lse.isneginf(), 0, torch.exp(part_lse - lse))
        rows = weight.mT[..., None]
        difference = (dout.to(lse.dtype) * (part.to(lse.dtype) - out.to(lse.dtype))).sum(-1).mT
        dlse = weight * (difference if dlse is None else difference + dlse)
        dout, out, lse = (rows * dout).to(dout.dtype), part, part_lse
    return attention_op.attention_backward(dout, dlse, out, lse, *operands, _OF_QKV)[:3]
