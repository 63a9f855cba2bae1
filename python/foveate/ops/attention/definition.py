"""The definition of attention, `backend/reference/attention.py`, on `Operands`: forward, and backward through autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.backend.reference import attention as reference
from foveate.ops import autograd
from foveate.ops.attention.operands import DIFFERENTIABLE, Operands
from foveate.ops.torch_internals import recordable


def definition(c: Operands) -> tuple[Tensor, Tensor]:
    """out, lse of `Operands` in plain torch, differentiable in every mode and as often as anyone likes."""
    with torch.autocast("cpu" if c.q.is_meta else c.q.device.type, enabled=False):
        return forward(c)


def forward(c: Operands) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {
        "causal": c.causal,
        "window": (c.window_left, c.window_right),
        "scale": c.scale,
        "softcap": c.softcap,
        "alibi_slopes": c.alibi if c.alibi is None or c.alibi.shape[0] > 1 else c.alibi[0],
        "rel_table": c.rel_table,
        "rel_bidirectional": c.rel_bidirectional,
        "rel_max_distance": c.rel_max_distance,
        "sinks": c.sinks,
        "dropout_p": c.dropout_p,
        "philox": c.philox,
    }
    if not torch.compiler.is_compiling() and not any(
        x is not None and autograd.is_wrapped(x) for x in (c.kv_lens, c.cu_q, c.cu_k)
    ):
        check_lengths(c)  # values that a compiler and vmap do not show
    if c.cu_q is not None and c.cu_k is not None:
        return reference.attention_varlen(c.q, c.k, c.v, c.cu_q, c.cu_k, **options)
    return reference.attention(c.q, c.k, c.v, bias=c.bias, mask=c.mask, kv_lens=c.kv_lens, **options)


def check_lengths(c: Operands) -> None:
    if c.cu_q is not None and c.cu_k is not None:
        _check_cu_seqlens("q", c.cu_q, c.q.shape[0], c.max_q)
        _check_cu_seqlens("k", c.cu_k, c.k.shape[0], c.max_k)
    if c.kv_lens is not None:
        _check_kv_lens(c.kv_lens, c.k.shape[1])


def _check_kv_lens(kv_lens: Tensor, Skv: int) -> None:
    for b, length in enumerate(kv_lens.tolist()):
        if not 0 <= length <= Skv:
            raise ValueError(f"kv_lens[{b}] = {length} is outside 0..{Skv}, the number of keys in k")


def _check_cu_seqlens(which: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    values = cu_seqlens.tolist()
    for i, value in enumerate(values):
        wrong = value != 0 if i == 0 else value < values[i - 1]
        if wrong or (i == len(values) - 1 and value != total):
            raise ValueError(
                f"cu_seqlens_{which} must start at 0, never decrease and end at {total}; entry {i} is {value}"
            )
        if i > 0 and value - values[i - 1] > longest:
            raise ValueError(
                f"cu_seqlens_{which} has a sequence of length {value - values[i - 1]} at {i - 1}, longer than "
                f"max_seqlen_{which} = {longest}"
            )


def backward(dout: Tensor, dlse: Tensor | None, c: Operands, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    leaves: list[Any] = list(c)
    for i, want in zip(DIFFERENTIABLE, wanted):
        if want:
            leaves[i] = leaves[i].detach().requires_grad_()
    inputs = [leaves[i] for i, want in zip(DIFFERENTIABLE, wanted) if want]
    with recordable(), torch.enable_grad(), torch.autocast(c.q.device.type, enabled=False):
        out, lse = forward(Operands(*leaves))
        outputs, seeds = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
        gradients = iter(torch.autograd.grad(outputs, inputs, seeds, allow_unused=True, materialize_grads=True))
    return tuple(next(gradients).contiguous() if want else c.q.new_empty(0) for want in wanted)
