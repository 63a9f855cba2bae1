"""What the launchers of kernels ask of a GPU, native and Triton alike."""

from __future__ import annotations

import functools

import torch


@functools.lru_cache(maxsize=16)
def num_sms(device: torch.device) -> int:
    """Number of SMs of a GPU (subslices of Intel's); for the emulator and the interpreter, a value small enough to force splitting."""
    if device.type == "cpu":
        return 16
    properties = getattr(torch, device.type).get_device_properties(device)
    return properties.gpu_subslice_count if device.type == "xpu" else properties.multi_processor_count
