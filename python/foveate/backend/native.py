"""The compiled module, or the reason why it is missing. torch is imported first: the kernels share its OpenMP runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from foveate.backend.registry import Query, Supports


class _Missing:
    """Stands in for a compiled module that does not load: each use of it raises the reason."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name}: {missing_reason}")


missing_reason: str | None = None
if TYPE_CHECKING:
    from foveate import _C
else:
    try:
        from foveate import _C
    except ImportError as error:
        missing_reason = f"the compiled module is missing or does not load ({error}); reinstall foveate or build it with `pip install .`"
        _C = _Missing()


def supports(*, cuda: bool = True) -> Supports:
    """The part of `supports` that every op of this backend shares. cuda: the op has a CUDA kernel beside the CPU's."""

    def answer(query: Query) -> str | None:
        if missing_reason is not None:
            return missing_reason
        if query.device == "cuda" and torch.version.hip is not None:
            return "the compiled CUDA kernels run on NVIDIA's GPUs, this PyTorch is a ROCm build"
        if not runs_cuda_kernels(query.device):
            return (
                None
                if query.device == "cpu"
                else f"the compiled kernels run on cpu and cuda, the tensors are on {query.device}"
            )
        if not cuda:
            return f"its compiled kernel runs on cpu, the tensors are on {query.device}"
        if not _C.has_cuda_kernels():
            return f"the compiled kernels of this build run on cpu, the tensors are on {query.device}"
        if query.dtype == torch.float64:
            return "the CUDA kernels take float32, bfloat16 and float16; float64 runs on the CPU and on the reference backend"
        if query.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "the CUDA kernels need compute capability 8.0 (Ampere) or later"
        return None

    return answer


def runs_cuda_kernels(device: str) -> bool:
    """True for what the native backend does with CUDA kernels: in the emulator's test build that is everything."""
    return device == "cuda" or (device == "cpu" and missing_reason is None and _C.cuda_emulated)
