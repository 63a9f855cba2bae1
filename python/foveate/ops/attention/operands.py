"""The arguments of the attention ops, listed once: schema, options in use, gradients and binding follow from `Operands`.

`dense.py` and `varlen.py` check what a call means and normalise it to these: masks and biases have four dimensions, tables and sinks
are in the accumulation dtype (fp32, for fp64 inputs fp64), lengths have one dimension, and a window or a softcap that is not used is
-1 or 0. With cu_q, q is packed [total_q, Hq, D] and lse [Hq, total_q].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.backend.registry import Query, choose, forget_with_choices

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SymInt = int  # a size, which stays symbolic in a compiled graph
Scalar = float  # may be computed from a size, and stays symbolic too


class Operands(NamedTuple):
    """What is not given is not used; max_q and max_k, the longest lengths, always are given.

    csrc/contract/attention.h has the same list, which a test compares: the compiled module takes this tuple as it is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None  # [B or 1, Hq or 1, Sq or 1, Skv or 1]
    mask: Tensor | None = None  # the same, bool
    alibi: Tensor | None = None  # fp32 [B or 1, Hq]
    rel_table: Tensor | None = None  # [buckets, Hq]
    sinks: Tensor | None = None  # [Hq]
    kv_lens: Tensor | None = None  # int32 or int64 [B]
    cu_q: Tensor | None = None  # int32 or int64 [B + 1]
    cu_k: Tensor | None = None
    philox: Tensor | None = None  # int64 [2]
    max_q: SymInt = 0
    max_k: SymInt = 0
    causal: bool = False
    window_left: SymInt = -1
    window_right: SymInt = -1
    scale: Scalar = 1.0
    softcap: float = 0.0
    rel_bidirectional: bool = True
    rel_max_distance: int = 0
    dropout_p: float = 0.0
    deterministic: bool = False  # of the backward: equal calls give bitwise identical gradients
    backend: str = ""  # "" for the best


def make(values: tuple[Any, ...]) -> Operands:
    """Operands of one tuple in their order: `Operands(*values)` takes ten times as long, on the path of every call."""
    return tuple.__new__(Operands, values)


def schema_of(operands: type[tuple[Any, ...]], written: Sequence[str] = ()) -> str:
    """The arguments of an op's schema, of a NamedTuple's annotations; `written` are the tensors that the op changes in place."""
    arguments = []
    for name, hint in operands.__annotations__.items():
        kind, *optional = str(getattr(hint, "__forward_arg__", hint)).split(" | ")
        alias = f"({'abcd'[written.index(name)]}!)" if name in written else ""
        arguments.append(f"{kind}{alias}{'?' if optional else ''} {name}")
    return ", ".join(arguments)


SCHEMA = schema_of(Operands)

# The dimensions of each tensor, which come first among the operands. B and H (of q or of k and v) are those that a call can be divided
# by; with "?" the size may be 1. What a packed batch has in place of B and S is one dimension.
AXES = {
    "q": ("B", "S", "H", "D"),
    "k": ("B", "S", "H", "D"),
    "v": ("B", "S", "H", "D"),
    "bias": ("B?", "H?", "S", "S"),
    "mask": ("B?", "H?", "S", "S"),
    "alibi": ("B?", "H"),
    "rel_table": ("buckets", "H"),
    "sinks": ("H",),
    "kv_lens": ("B",),
    "cu_q": ("lengths",),
    "cu_k": ("lengths",),
    "philox": ("seed",),
}
NUM_TENSORS = len(AXES)


def tensors_of(values: Sequence[Any]) -> tuple[Any, ...]:
    """The tensors among `Operands`, or a plain tuple of them."""
    return tuple(values[:NUM_TENSORS])


class Gradients(NamedTuple):
    """One entry for each operand that has a gradient, in the order of the backward op's results, of its argument `wanted`, and of what
    the compiled module takes."""

    q: Any
    k: Any
    v: Any
    bias: Any
    rel_table: Any
    sinks: Any


DIFFERENTIABLE = tuple(Operands._fields.index(name) for name in Gradients._fields)


def wanted_of(needs_input_grad: Sequence[bool]) -> list[bool]:
    """Which of `Gradients` a backward pass needs, of what autograd says of each operand. A list, as the schema's bool[]."""
    return [needs_input_grad[i] for i in DIFFERENTIABLE]


def per_operand(gradients: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """For autograd: the gradient of each operand, None for those without one."""
    of_operands: list[Any] = [None] * len(Operands._fields)
    for i, want, gradient in zip(DIFFERENTIABLE, wanted, gradients, strict=True):
        of_operands[i] = gradient if want else None
    return of_operands


class Used(NamedTuple):
    """Which options a call uses, under the names that users give them: what the choice of a backend may depend on."""

    bias: bool = False
    mask: bool = False
    alibi_slopes: bool = False
    relative_bias: bool = False
    sinks: bool = False
    kv_lens: bool = False
    varlen: bool = False
    causal: bool = False
    window: bool = False
    softcap: bool = False
    dropout_p: bool = False
    score_mod: bool = False


def used(c: Operands, score_mod: bool = False) -> Used:
    values = (
        c.bias is not None, c.mask is not None, c.alibi is not None, c.rel_table is not None, c.sinks is not None,
        c.kv_lens is not None, c.cu_q is not None, c.causal, c.window_left >= 0 or c.window_right >= 0, c.softcap > 0,
        c.dropout_p > 0, score_mod,
    )  # fmt: skip
    return tuple.__new__(Used, values)


@functools.lru_cache(maxsize=4096)
def query(device: str, dtype: torch.dtype, D: int, Dv: int, options: Used) -> Query:
    """What the choice of the backend depends on."""
    return Query(device, dtype, (D, Dv, *(name for name, use in zip(Used._fields, options, strict=True) if use)))


def query_of(c: Operands, score_mod: bool = False) -> Query:
    q = c.q
    return query(q.device.type, q.dtype, q.shape[-1], c.v.shape[-1], used(c, score_mod))


def chosen(op: str, c: Operands) -> str:
    """The backend that serves "attention" or "attention_backward"."""
    q = c.q
    device = "cpu" if q.is_cpu else q.device.type
    return _choice(op, device, q.dtype, q.shape[-1], c.v.shape[-1], used(c), c.backend or None)


@functools.lru_cache(maxsize=4096)
def _choice(op: str, device: str, dtype: torch.dtype, D: int, Dv: int, options: Used, backend: str | None) -> str:
    """`choose`, without a Query to build and hash on the path of every call."""
    return choose(op, query(device, dtype, D, Dv, options), backend)


forget_with_choices(_choice.cache_clear)
