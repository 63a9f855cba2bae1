"""What several architectures share: activations by their name in config.json, norms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.nn import PackedLinear
from foveate.ops.rms_norm import rms_norm

_gelu_tanh = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
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


class LayerNorm(nn.Module):
    """LayerNorm in fp32 over the last dimension: of `size`, or of [heads, D] with weights of each head's own.

    bias: whether it has one; plain: neither weight nor bias (OLMo); offset: 1 in Nemotron, whose weights lie around 0.
    """

    def __init__(
        self, size: int | tuple[int, int], eps: float, *, bias: bool = False, plain: bool = False, offset: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = (
            None if plain else nn.Parameter(torch.full((size,) if isinstance(size, int) else size, 1.0 - offset))
        )
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype is torch.float64 else x.float()
        wide = F.layer_norm(wide, x.shape[-1:], None, None, self.eps)
        if self.weight is not None:
            wide = wide * (self.weight.to(wide.dtype) + self.offset)
        if self.bias is not None:
            wide = wide + self.bias.to(wide.dtype)
        return wide.to(x.dtype)


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
