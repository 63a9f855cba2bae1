"""Triton kernels, the backend for GPUs. On CPU tensors they run under triton's interpreter where TRITON_INTERPRET=1 was set at start.

triton is imported with the first call that runs here: `serves` answers without it. docs/kernels/triton.md describes the kernels.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from foveate.backend.registry import Query

Launch = TypeVar("Launch", bound=Callable[..., Any])

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPUS = ("cuda", "xpu")  # NVIDIA's, and AMD's in a torch for ROCm; Intel's


@functools.lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether the kernels run under the interpreter: triton decides that when it is imported, so the answer is kept."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=1)
def missing_reason() -> str | None:
    """None if the kernels can run on some device here, else the sentence why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton`"
    if interpreted() or any(getattr(torch, name).is_available() for name in GPUS):
        return None
    return "no GPU was found; on CPU tensors the kernels run slowly, for tests, if TRITON_INTERPRET=1 is set at start"


def serves(query: Query) -> str | None:
    """The part of `supports` that every op shares: triton itself, the device and the dtype."""
    if importlib.util.find_spec("triton") is None:
        return missing_reason()
    if query.device == "cpu" and not interpreted():
        return (
            "the triton kernels run on GPUs, the tensors are on cpu; set TRITON_INTERPRET=1 at start to interpret them"
        )
    if query.device in GPUS and interpreted():
        return f"TRITON_INTERPRET=1 is set, so the kernels are interpreted and take CPU tensors; the tensors are on {query.device}"
    if query.device not in ("cpu", *GPUS):
        return f"the triton kernels run on {' and '.join(GPUS)} tensors, these are on {query.device}"
    nvidia = query.device == "cuda" and torch.version.hip is None and torch.cuda.is_available()
    if nvidia and torch.cuda.get_device_capability() < (8, 0):
        return "triton compiles for compute capability 8.0 (Ampere) and later"
    if query.dtype not in DTYPES:
        return f"the triton kernels take {', '.join(map(str, DTYPES))}, the tensors are {query.dtype}"
    return None


def on_device(launch: Launch) -> Launch:
    """`launch` with the GPU of its first argument, a tensor or a call's Operands, as the current one: there triton starts kernels."""

    @functools.wraps(launch)
    def guarded(first: Any, *args: Any) -> Any:
        device = getattr(first, "q", first).device
        if device.type == "cpu":
            return launch(first, *args)
        gpus = getattr(torch, device.type)
        if device.index == gpus.current_device():
            return launch(first, *args)
        with gpus.device(device):
            return launch(first, *args)

    return cast(Launch, guarded)
