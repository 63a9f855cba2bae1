"""Checks that several ops share. Each error is a sentence with the values and the cure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate._backends import Query, choose

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_floating(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{name} is {t.dtype}; it must be float32, bfloat16, float16 or float64: convert it with {name}.to(...)"
        )


def check_same_device(name: str, t: Tensor, x_name: str, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device} and {x_name} on {x.device}; move one with .to(device)")


def check_same_dtype(name: str, t: Tensor, x_name: str, x: Tensor) -> None:
    check_floating(name, t)
    check_same_device(name, t, x_name, x)
    if t.dtype != x.dtype:
        raise TypeError(f"{name} is {t.dtype} and {x_name} is {x.dtype}; convert one with .to({x.dtype})")


def check_dtype_or_compute(name: str, t: Tensor, x_name: str, x: Tensor) -> None:
    """t has the dtype of x, or the one that x is computed in."""
    check_floating(name, t)
    check_same_device(name, t, x_name, x)
    compute = compute_dtype(x)
    if t.dtype not in (x.dtype, compute):
        wanted = f"{x.dtype} or {compute}" if x.dtype != compute else f"{x.dtype}"
        raise TypeError(f"{name} is {t.dtype} and {x_name} is {x.dtype}; convert {name} to {wanted}")


def check_finite(name: str, value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{name}={value} must be a finite number")
    return float(value)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an op on x accumulates in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chosen_backend(op: str, device: str, dtype: torch.dtype, backend: str | None) -> str:
    """`choose`, as a constant for torch.compile: it need not trace the table."""
    return choose(op, Query(device, dtype), backend)


# All that torch.compiler.assume_constant_result does, but that imports torch._dynamo: a second of `import foveate`.
chosen_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
