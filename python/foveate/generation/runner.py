"""What runs a model: the native decoder where it can, CUDA graphs where they can."""

from __future__ import annotations

from typing import Any

import torch

from foveate.generation.decode_graph import DecodeGraph


def fastest(module: torch.nn.Module, device: torch.device, fits: bool = True) -> tuple[Any, str]:
    """What runs the model, and a sentence about it. fits: its weights may be packed, which takes memory."""
    if device.type != "cpu":
        return module, f"torch modules with foveate's attention, on {device}"
    if not fits:
        why = "the weights are larger than the free memory: experts are read from the file as they are chosen"
        return module, f"torch modules with foveate's attention, as {why}"
    try:
        from foveate.models.native_decoder import NativeDecoder
    except ImportError:
        return module, "torch modules with foveate's attention, as this build has no native decoder"
    reason = NativeDecoder.unsupported(module)
    if reason is not None:
        return module, f"torch modules with foveate's attention, as the native decoder cannot run this model: {reason}"
    return NativeDecoder(module), "the native decoder"


def graphs(module: torch.nn.Module, wanted: bool | None) -> tuple[bool, str]:
    """Whether decode steps run in CUDA graphs, and a sentence about it; ValueError if they are wanted and cannot."""
    if wanted is False:
        return False, "decode steps without CUDA graphs: cuda_graphs=False"
    reason = DecodeGraph.unsupported(module)
    if reason is None:
        return True, "decode steps in CUDA graphs"
    if wanted:
        raise ValueError(f"cuda_graphs=True, but {reason}; leave cuda_graphs out to run without graphs")
    return False, f"decode steps without CUDA graphs: {reason}"
