"""Checks that several ops share. Each error is a sentence with the values and the cure."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from foveate.backend.reference.rows import compute_dtype
from foveate.backend.registry import ORDER, Query, UnsupportedError, choose, forget_with_choices
from foveate.ops import dtensor

_PLAIN = (Tensor, torch.nn.Parameter)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class DtypeError(TypeError, ValueError):
    """A tensor of a dtype that the op does not take. Attention raised ValueError for it before, and until 1.0 both are caught."""


def check_floating(name: str, t: Tensor) -> None:
    check_strided(name, t)
    if t.dtype not in FLOATS:
        raise TypeError(
            f"{name} is {t.dtype}; it must be float32, bfloat16, float16 or float64: convert it with {name}.to(...)"
        )


def check_same_device(name: str, t: Tensor, x_name: str, x: Tensor) -> None:
    if not (t.is_cpu and x.is_cpu) and t.device != x.device:  # two torch.device objects cost more than the flags
        raise ValueError(f"{name} is on {t.device} and {x_name} on {x.device}; move it with .to({x_name}.device)")


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


def check_number(name: str, value: Any, wanted: str = "a finite number") -> float:
    """value as a finite Python number: numpy's are converted, what torch.compile or torch.export made symbolic stays as it is."""
    if not isinstance(value, (float, int)):
        value = _python_number(name, value, wanted)
    # A comparison with the largest float, which NaN, infinities and longer integers fail: math.isfinite is not traced for symbolic
    # numbers. Literals, as torch.compile takes a global for a number that may change.
    if not -1.7976931348623157e308 <= value <= 1.7976931348623157e308:
        raise ValueError(f"{name}={value} must be {wanted}")
    return value if isinstance(value, float) else torch.sym_float(value)


def _python_number(name: str, value: Any, wanted: str) -> Any:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a Python number, got a tensor; pass {name}.item() (which waits for the device)"
        )
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be {wanted}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def check_learned(name: str, value: Tensor, x_name: str, x: Tensor, backend: str | None) -> None:
    """A tensor where a number is meant: one number, whose gradient the plain torch definition of the op gives."""
    check_floating(name, value)
    check_same_device(name, value, x_name, x)
    if value.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; a learned one is a tensor of one number, of shape ()")
    if backend not in (None, "reference"):
        raise UnsupportedError(
            f"backend {backend!r} takes {name} as a Python number; a tensor is computed in plain torch, by backend=None or 'reference'"
        )


def check_integer(name: str, value: Any, wanted: str = "an integer") -> int:
    """value as a Python int: numpy's are converted, symbolic ones stay as they are, floats are refused."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor):
        if torch.jit.is_tracing() and value.dim() == 0 and not value.is_floating_point():
            return int(
                value
            )  # what was computed from a size is a tensor there; torch warns that the trace keeps this value
        raise TypeError(f"{name} must be a Python int, got a tensor; pass int({name}) (which waits for the device)")
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; it must be {wanted}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """value as True or False, for which 1 and 0 and numpy's bool are taken; a tensor, a string or None is a mistake."""
    if isinstance(value, (bool, torch.SymBool)):
        return bool(value)
    numpy_bool = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
    if numpy_bool or (isinstance(value, numbers.Integral) and value in (0, 1)):
        return bool(value)
    kind = "a tensor" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"{name} must be True or False, got {kind}")


def check_generator(generator: Any) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}; for a seed pass "
            "torch.Generator().manual_seed(seed)"
        )


def check_backend_name(backend: Any) -> str:
    """The name, "" for None."""
    if backend is None:
        return ""
    if not isinstance(backend, str):
        raise TypeError(f"backend={backend!r} must be the name of a backend, or None for the best that serves the call")
    if backend not in ORDER:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(ORDER)} or None for the best")
    return backend


def check_strided(name: str, t: Any) -> None:
    """A tensor of any dtype, neither nested nor sparse."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if type(t) not in _PLAIN:
        dtensor.notice(t)
    if t.layout is torch.strided and not t.is_nested:
        return
    if t.is_nested:
        raise ValueError(
            f"{name} is a nested tensor here; pass its values() with offsets() as cu_seqlens to foveate.attention_varlen, or "
            "its values() to an op over rows"
        )
    raise ValueError(f"{name} has layout {t.layout}; convert it with {name}.to_dense()")


def chosen_backend(op: str, x: Tensor, backend: str, features: tuple[Hashable, ...] = ()) -> str:
    """The backend that serves op on tensors as x: the best if backend is "". Asked inside the ops, where torch.compile does not see it."""
    return _choice(op, "cpu" if x.is_cpu else x.device.type, x.dtype, features, backend or None)


def composition_backend(op: str, device: str, dtype: torch.dtype, backend: str) -> str:
    """`chosen_backend` for a function that composes ops outside of them: a constant for torch.compile, which need not trace the table."""
    return _choice(op, device, dtype, (), backend or None)


# All that torch.compiler.assume_constant_result does, but that imports torch._dynamo: a second of `import foveate`.
composition_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(maxsize=4096)
def _choice(op: str, device: str, dtype: torch.dtype, features: tuple[Hashable, ...], backend: str | None) -> str:
    """`choose`, without a Query to build and hash in every call."""
    return choose(op, Query(device, dtype, features), backend)


forget_with_choices(_choice.cache_clear)
