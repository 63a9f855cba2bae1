"""What several architectures share: activations by their name in config.json, RMSNorm, rotary tables."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.nn import PackedLinear
from foveate.ops.rms_norm import rms_norm

_FIRST_POSITIONS = 4096  # rows of a rotary table that is made at the first call

_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"the activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gated(function: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """function(gate) * up"""
    out = function(gate)
    return out * up if torch.is_grad_enabled() else out.mul_(up)


def need(config: dict[str, Any], *keys: str) -> Any:
    """The value of the first of `keys` that config.json has."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise CheckpointError(
        f"the config of this {config.get('model_type', 'model')} has no {' or '.join(map(repr, keys))}"
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * D] -> [B, S, heads, D], a view."""
    return x.unflatten(-1, (heads, -1))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x**2) + eps) * (weight + offset), computed in fp32; offset is 1 in Gemma, whose weights lie around 0."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.offset:
            weight = (weight if weight.dtype is torch.float64 else weight.float()) + self.offset
        return rms_norm(x, weight, self.eps)


class PackedEmbedding(nn.Module):
    """An embedding whose quantised table is, or could be, the head's PackedLinear: rows are expanded as they are looked up."""

    like: Tensor

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = packed
        # so that model.to(dtype) reaches the rows
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., hidden]"""
        return self.packed.rows(tokens).to(self.like.dtype)


class Rotary:
    """cos and sin of every position, [max_positions, rot / 2], in fp32 whatever the model's dtype (RoFormer, arXiv 2104.09864).

    Not a module: casting a model to bf16 must not cast the tables, and a meta device must not swallow them.
    scaling: None or config.json's `rope_scaling`, of type "linear" or "llama3".
    """

    def __init__(self, rot: int, max_positions: int, theta: float, scaling: dict[str, Any] | None = None) -> None:
        self.max_positions = max_positions
        exponents = torch.arange(0, rot, 2, dtype=torch.float32, device="cpu") / rot
        self.frequencies = _scale(1.0 / theta**exponents, scaling)
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def tables(
        self, device: torch.device, dtype: torch.dtype = torch.float32, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos, sin on the device, of the first `length` positions at least, all if None; fp64 for models in fp64, fp32 for all others.

        Computed as far as they are asked for: a config that says 10 million positions must not cost gigabytes by itself.
        """
        dtype = dtype if dtype is torch.float64 else torch.float32
        key = (device, dtype)
        needed = self.max_positions if length is None else min(length, self.max_positions)
        if key not in self._tables or len(self._tables[key][0]) < needed:
            rows = min(self.max_positions, max(_FIRST_POSITIONS, 1 << max(needed - 1, 0).bit_length()))
            positions = torch.arange(rows, dtype=torch.float32, device="cpu")
            angles = positions[:, None] * self.frequencies
            self._tables[key] = (angles.cos().to(device, dtype), angles.sin().to(device, dtype))
        return self._tables[key]


def _needed(scaling: dict[str, Any], kind: str, *keys: str) -> list[float]:
    absent = [key for key in keys if scaling.get(key) is None]
    if absent:
        raise CheckpointError(f"rope_scaling of type {kind!r} lacks {' and '.join(absent)}")
    return [scaling[key] for key in keys]


def _scale(frequencies: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
    if scaling is None or kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / _needed(scaling, kind, "factor")[0]
    if kind == "divisors":  # of each frequency, as GGUF files store Llama 3.1's scaling
        divisors = torch.tensor(scaling["divisors"], device="cpu")
        if divisors.shape != frequencies.shape or not (divisors > 0).all():
            raise CheckpointError(
                f"rope_freqs.weight has {divisors.numel()} values; RoPE needs {len(frequencies)}, all above 0"
            )
        return frequencies / divisors
    if kind != "llama3":
        raise CheckpointError(f"rope_scaling of type {kind!r} is not supported; known are default, linear and llama3")
    # Llama 3.1: short waves stay, long ones are stretched by `factor`, those between are blended by their number of turns
    # within the context that the model was first trained on.
    keys = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    first_context, low, high, factor = _needed(scaling, kind, *keys)
    if low >= high:
        raise CheckpointError(
            f"rope_scaling has low_freq_factor={low} and high_freq_factor={high}; the first must be the lower"
        )
    turns = first_context * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)
