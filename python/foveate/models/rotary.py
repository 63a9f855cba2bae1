"""Rotary tables: cos and sin of every position, with the scalings that config.json's `rope_scaling` or `rope_parameters` name."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError

_FIRST_POSITIONS = 4096  # rows of a rotary table that is made at the first call
KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")


class Rotary:
    """cos and sin of every position, [max_positions, rot / 2], in fp32 whatever the model's dtype (RoFormer, arXiv 2104.09864).

    Not a module: casting a model to bf16 must not cast the tables, and a meta device must not swallow them.
    scaling: None or config.json's `rope_scaling`; its type is one of KINDS. "longrope" has factors for short and for long texts: the
    long ones serve tables of more than `short_positions`, and all where `long` is True.
    """

    def __init__(self, rot: int, max_positions: int, theta: float, scaling: dict[str, Any] | None = None) -> None:
        self.max_positions = max_positions
        exponents = torch.arange(0, rot, 2, dtype=torch.float32, device="cpu") / rot
        self.frequencies, self.factor = _scale(theta, exponents, scaling, max_positions)
        self.short_positions: int | None = None
        self.long = False
        if scaling is not None and _kind(scaling) in ("longrope", "su"):
            self.short_positions = int(_needed(scaling, "longrope", "original_max_position_embeddings")[0])
            self._long_frequencies = _longrope(theta, exponents, scaling, "long_factor")
        self._tables: dict[tuple[torch.device, torch.dtype, bool], tuple[Tensor, Tensor]] = {}

    def tables(
        self, device: torch.device, dtype: torch.dtype = torch.float32, length: int | None = None, cached: bool = False
    ) -> tuple[Tensor, Tensor]:
        """cos, sin on the device, of the first `length` positions at least, all if None; fp64 for models in fp64, fp32 for all others.

        Computed as far as they are asked for: a config that says 10 million positions must not cost gigabytes by itself.
        cached: for steps with a cache, whose keys were rotated by an earlier table: there `long` alone says which factors serve.
        """
        dtype = dtype if dtype is torch.float64 else torch.float32
        needed = self.max_positions if length is None else min(length, self.max_positions)
        long = self.short_positions is not None and (self.long or (not cached and needed > self.short_positions))
        key = (device, dtype, long)
        if key not in self._tables or len(self._tables[key][0]) < needed:
            rows = min(self.max_positions, max(_FIRST_POSITIONS, 1 << max(needed - 1, 0).bit_length()))
            with torch.inference_mode(False):  # a later call may want gradients through the same table
                positions = torch.arange(rows, dtype=torch.float32, device="cpu")
                angles = positions[:, None] * (self._long_frequencies if long else self.frequencies)
                cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
                self._tables[key] = (cos.to(device, dtype), sin.to(device, dtype))
        return self._tables[key]


def _kind(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def _needed(scaling: dict[str, Any], kind: str, *keys: str) -> list[Any]:
    absent = [key for key in keys if scaling.get(key) is None]
    if absent:
        raise CheckpointError(f"rope_scaling of type {kind!r} lacks {' and '.join(absent)}")
    return [scaling[key] for key in keys]


def _scale(theta: float, exponents: Tensor, scaling: dict[str, Any] | None, max_positions: int) -> tuple[Tensor, float]:
    """The angles from one position to the next, and what cos and sin are multiplied by."""
    frequencies = 1.0 / theta**exponents
    kind = "default" if scaling is None else _kind(scaling)
    if scaling is None or kind == "default":
        return frequencies, 1.0
    if kind == "linear":
        return frequencies / _needed(scaling, kind, "factor")[0], 1.0
    if (
        kind == "dynamic"
    ):  # changes texts beyond the first context only, which are refused; a fixed alpha changes all (Hunyuan)
        rot = 2 * len(exponents)
        alpha = scaling.get("alpha") or 1.0
        return 1.0 / (theta * alpha ** (rot / max(rot - 2, 1))) ** exponents, 1.0
    if kind == "divisors":  # of each frequency, as GGUF files store Llama 3.1's scaling
        divisors = torch.tensor(scaling["divisors"], device="cpu")
        if divisors.shape != frequencies.shape or not (divisors > 0).all():
            raise CheckpointError(
                f"rope_freqs.weight has {divisors.numel()} values; RoPE needs {len(frequencies)}, all above 0"
            )
        return frequencies / divisors, 1.0
    if kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if kind == "yarn":
        return _yarn(theta, exponents, scaling, max_positions)
    if kind in ("longrope", "su"):
        factor = scaling.get("attention_factor")
        if factor is None:
            first_context = _needed(scaling, kind, "original_max_position_embeddings")[0]
            stretch = scaling.get("factor") or max_positions / first_context
            factor = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(max(first_context, 2)))
        return _longrope(theta, exponents, scaling, "short_factor"), float(factor)
    raise CheckpointError(f"rope_scaling of type {kind!r} is not supported; known are {', '.join(KINDS)}")


def _longrope(theta: float, exponents: Tensor, scaling: dict[str, Any], key: str) -> Tensor:
    """A divisor of each frequency, found by search (Ding et al. 2024, arXiv 2402.13753)."""
    divisors = torch.tensor(_needed(scaling, "longrope", key)[0], dtype=torch.float32, device="cpu")
    if divisors.shape != exponents.shape or not (divisors > 0).all():
        raise CheckpointError(
            f"{key} in rope_scaling has {divisors.numel()} values; RoPE needs {len(exponents)}, all above 0"
        )
    return 1.0 / (divisors * theta**exponents)


def _llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1: short waves stay, long ones are stretched by `factor`, those between are blended by their number of turns within the
    context that the model was first trained on."""
    keys = ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor", "factor")
    first_context, low, high, factor = _needed(scaling, "llama3", *keys)
    if low >= high:
        raise CheckpointError(
            f"rope_scaling has low_freq_factor={low} and high_freq_factor={high}; the first must be the lower"
        )
    turns = first_context * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)


def _yarn(theta: float, exponents: Tensor, scaling: dict[str, Any], max_positions: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): a ramp over the elements between waves that stay and waves that are stretched."""
    first_context = scaling.get("original_max_position_embeddings") or max_positions
    factor = scaling.get("factor") or max_positions / first_context
    rot = 2 * len(exponents)
    if theta <= 1:
        raise CheckpointError(f"rope_theta={theta} with rope_scaling of type 'yarn' must be above 1")

    def element(turns: float) -> float:
        """Which element rotates so often within the first context."""
        return rot * math.log(first_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = element(scaling.get("beta_fast") or 32), element(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rot - 1)
    ramp = (torch.arange(len(exponents), dtype=torch.float32, device="cpu") - low) / ((high - low) or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    frequencies = 1.0 / theta**exponents
    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = yarn_scale(factor)
        if mscale and all_dim:
            attention = yarn_scale(factor, mscale) / yarn_scale(factor, all_dim)
    return frequencies * keep + frequencies / factor * (1 - keep), float(attention)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
