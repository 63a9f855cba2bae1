"""
Compiled kernels of foveate. Take them through torch.ops.foveate or the public functions.
"""

from __future__ import annotations

import typing

import torch

__all__: list[str] = [
    "cpu_target",
    "cpu_targets",
    "cuda_info",
    "rms_norm_forward",
    "set_dlpack_exchange",
    "uses_dlpack_exchange",
]

def cpu_target() -> str:
    """
    the CPU instruction set in use
    """

def cpu_targets() -> list[tuple[str, bool]]:
    """
    (name, runs on this machine) of every compiled CPU instruction set, weakest first
    """

def cuda_info() -> dict:
    """
    whether CUDA kernels are compiled in, the CUDA versions (13000 is 13.0), the number of devices, why there are none
    """

def rms_norm_forward(
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    out: torch.Tensor | None,
    rstd: torch.Tensor | None,
    eps: typing.SupportsFloat | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def set_dlpack_exchange(enabled: bool) -> None: ...
def uses_dlpack_exchange() -> bool: ...
