"""Formulas of the ops that multiply matrices for torch.utils.flop_counter.FlopCounterMode.

As torch counts its own: a multiply-add is two, what is masked (causal, window, a mask) counts as if it were not, and softmax, norms and
losses of logits, which multiply no matrices, count nothing. Lengths that are known (cu_seqlens, kv_lens) are used.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from foveate.ops.attention.cache_operands import CacheOperands
from foveate.ops.attention.operands import Operands
from foveate.ops.torch_internals import FakeTensor

_registered = False


def register() -> None:
    """Gives torch's counter the formulas once something has imported it, which takes longer than `import foveate`. The ops call this."""
    global _registered
    if (
        torch.compiler.is_compiling() or _registered
    ):  # in this order: a graph that has read the flag is compiled again once it is set
        return
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    _registered = True
    formulas = _formulas()
    for op, formula in formulas.items():
        counter.register_flop_formula(op, get_raw=True)(formula)
    # A counter that is active already has its own copy of the table.
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        table = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if table is not None:
            for op, formula in formulas.items():
                table.setdefault(op, formula)


def _formulas() -> dict[Any, Any]:
    ops = torch.ops.foveate
    return {
        ops.attention_forward: _attention_forward,
        ops.attention_backward: _attention_backward,
        ops.attention_with_kv_cache: _with_kv_cache,
        ops.linear_cross_entropy: _linear_cross_entropy,
        ops.linear_cross_entropy_gradients: _linear_cross_entropy_gradients,
        ops.packed_linear: _packed_linear,
    }


def _known(lengths: Tensor | None) -> list[int] | None:
    """The values, unless the tensor has none (meta, fake)."""
    if lengths is None or lengths.is_meta or isinstance(lengths, FakeTensor):
        return None
    return lengths.tolist()


def _pairs(c: Operands) -> int:
    """Queries times keys, summed over the batch."""
    if c.cu_q is None or c.cu_k is None:
        return c.q.shape[0] * c.q.shape[1] * c.k.shape[1]
    starts_q, starts_k = _known(c.cu_q), _known(c.cu_k)
    if starts_q is None or starts_k is None:
        return (c.cu_q.shape[0] - 1) * c.max_q * c.max_k
    return sum((b - a) * (d - c) for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]))


def _attention_forward(*args: Any, **kwargs: Any) -> int:
    c = Operands(*args)
    return 2 * c.q.shape[-2] * (c.q.shape[-1] + c.v.shape[-1]) * _pairs(c)


def _attention_backward(dout: Tensor, dlse: Any, out: Any, lse: Any, *args: Any, **kwargs: Any) -> int:
    # s = q k, dq = ds k, dk = ds q over D; dp = dout v, dv = p dout over Dv. As in torch, whichever gradients are wanted.
    c = Operands(*args[:-1])
    return 2 * c.q.shape[-2] * (3 * c.q.shape[-1] + 2 * c.v.shape[-1]) * _pairs(c)


def _with_kv_cache(*args: Any, **kwargs: Any) -> int:
    c = CacheOperands(*args)
    B, Sq, Hq, D = c.q.shape
    lengths = _known(c.kv_lens)
    new = 0 if c.k is None else c.k.shape[1]
    capacity = c.k_cache.shape[1] * (1 if c.block_table is None else c.block_table.shape[1])
    keys = B * capacity if lengths is None else sum(lengths) + B * new
    return 2 * Sq * Hq * (D + c.v_cache.shape[-1]) * keys


def _linear_cross_entropy(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * hidden.shape[0] * weight.shape[0] * weight.shape[1]


def _linear_cross_entropy_gradients(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    need_hidden, need_weight = args[4:6]
    return (1 + bool(need_hidden) + bool(need_weight)) * _linear_cross_entropy(hidden, weight)


def _packed_linear(x: Tensor, data: Any, format: str, out_features: int, *args: Any, **kwargs: Any) -> int:
    return 2 * x.numel() * out_features
