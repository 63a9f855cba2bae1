"""Which backend serves a call. Each op registers, per backend, supports(query) -> None or the sentence why not.

`choose` is the only place where that is decided. A named backend that cannot serve the call raises; only the automatic
choice (backend=None) walks down the order native, triton, reference. Answers are cached by (op, query, backend).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from foveate import _native

ORDER = ("native", "triton", "reference")


class UnsupportedError(ValueError):
    """The named backend cannot serve this call; the message gives the reason and the backends that can."""


class Query(NamedTuple):
    """What a choice may depend on. Hashable, so that the choice is made once."""

    device: str  # "cpu", "cuda", ...
    dtype: object  # torch.dtype
    features: tuple[Hashable, ...] = ()  # names of the options in use, sizes that matter: the op's own vocabulary


Supports = Callable[[Query], "str | None"]
_supports: dict[tuple[str, str], Supports] = {}


def register(op: str, backend: str, supports: Supports) -> None:
    _supports[op, backend] = supports


def native(*, cuda: bool = True) -> Supports:
    """The part of the answer that the native ops share. cuda: the op has a CUDA kernel beside the CPU's."""

    def supports(query: Query) -> str | None:
        C = _native._C
        if C is None:
            return _native.missing_reason
        if query.device == "cuda" and torch.version.hip is not None:
            return "the compiled CUDA kernels run on NVIDIA's GPUs, this torch is one for ROCm"
        if not runs_cuda_kernels(query.device):
            return (
                None
                if query.device == "cpu"
                else f"the compiled kernels run on cpu and cuda, the tensors are on {query.device}"
            )
        if not cuda:
            return f"its compiled kernel runs on cpu, the tensors are on {query.device}"
        if not C.has_cuda_kernels():
            return f"the compiled kernels of this build run on cpu, the tensors are on {query.device}"
        if query.dtype == torch.float64:
            return "the CUDA kernels take float32, bfloat16 and float16; float64 runs on the CPU and on the reference backend"
        if query.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "the CUDA kernels need compute capability 8.0 (Ampere) or later"
        return None

    return supports


def runs_cuda_kernels(device: str) -> bool:
    """True for what the native backend does with CUDA kernels: in the emulator's test build that is everything."""
    return device == "cuda" or (device == "cpu" and _native._C is not None and _native._C.cuda_emulated)


@functools.lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for the emulator a number at which small cases are divided."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 16


def why_not(op: str, backend: str, query: Query) -> str | None:
    """None if `backend` can serve `op` for this query, else the reason as a sentence."""
    supports = _supports.get((op, backend))
    if supports is None:
        return f"{backend} has no {op}"
    return supports(query)


@functools.lru_cache(maxsize=4096)
def choose(op: str, query: Query, backend: str | None) -> str:
    """The name of the backend that serves the call."""
    if backend is not None:
        if backend not in ORDER:
            raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(ORDER)} or None for the best")
        reason = why_not(op, backend, query)
        if reason is None:
            return backend
        able = [name for name in ORDER if why_not(op, name, query) is None]
        raise UnsupportedError(f"backend={backend!r} cannot serve {op}: {reason}; able: {', '.join(able) or 'none'}")
    reasons = []
    for name in ORDER:
        reason = why_not(op, name, query)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UnsupportedError(f"no backend can serve {op}: " + "; ".join(reasons))


def backends() -> dict[str, str | None]:
    """Each backend's name with None if it can run here, else the sentence why not. `explain` answers for one call."""
    from foveate import _triton

    served = {backend for _, backend in _supports}
    answers = {name: None if name in served else f"this version has no {name} kernels" for name in ORDER}
    if _native._C is None:
        answers["native"] = _native.missing_reason
    if "triton" in served:
        answers["triton"] = _triton.missing_reason()
    return answers


class Info(dict[str, object]):
    """A dict that prints as one line for each entry."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.items())


def info() -> Info:
    """What is compiled and what this machine can run: versions, backends, instruction sets, CUDA, threads. Printable."""
    import foveate

    C = _native._C
    found = Info(foveate=foveate.__version__, torch=torch.__version__, python=platform.python_version())
    found.update({f"backend {name}": answer or "available" for name, answer in backends().items()})
    if C is not None:
        found["cpu target"] = C.cpu_target()
        found["cpu targets"] = ", ".join(
            name if runs_here else f"{name} (not on this CPU)" for name, runs_here in C.cpu_targets()
        )
        cuda = C.cuda_info() if hasattr(C, "cuda_info") else {"compiled": False}
        found.update({f"cuda {name}": value for name, value in cuda.items()})
        found["cuda kernels"] = "tested in an emulator, not yet run on a GPU" if C.has_cuda_kernels() else "none"
    found["triton kernels"] = "tested in triton's interpreter, not yet run on a GPU"
    found["threads"] = torch.get_num_threads()
    return found
