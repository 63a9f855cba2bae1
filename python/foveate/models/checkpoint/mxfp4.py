"""gpt-oss's experts in MXFP4 (OCP Microscaling Formats 1.0): 4-bit floats with a power of two for each 32, as blocks of mxfp4.

A value is t[q] * 2**(e - 128), where t holds the doubled e2m1 values 0 1 2 3 4 6 8 12 and their negatives.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError
from foveate.models.checkpoint.base import Blocks, Weights
from foveate.quantization.gguf_types import mxfp4_scale

_BLOCKS, _SCALES = "_blocks", "_scales"


def mxfp4_of(blocks: Tensor, scales: Tensor, what: str) -> Tensor:
    """uint8 [..., in / 32, 16] (even elements in the low nibbles) and [..., in / 32] -> blocks of mxfp4, uint8 [rows, in / 32 * 18]."""
    if blocks.dtype is not torch.uint8 or scales.dtype is not torch.uint8 or blocks.shape != (*scales.shape, 16):
        raise CheckpointError(
            f"{what} has blocks of {blocks.dtype} {list(blocks.shape)} and scales of {scales.dtype} {list(scales.shape)}; MXFP4 needs "
            "uint8 [..., 16] and uint8 [...]"
        )
    # A byte has the neighbours 2 i and 2 i + 1; in a block it has i and i + 16.
    nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    q = nibbles[..., :16] | nibbles[..., 16:] << 4
    used = (q & 0x77).ne(0).any(-1, keepdim=True)  # +0 and -0 need no scale
    try:
        d = mxfp4_scale(scales[..., None], used)
    except ValueError as error:
        raise CheckpointError(
            f"{what} has {error}, which cannot be packed here; take another file of the model"
        ) from None
    return torch.cat([d, q], -1).flatten(0, -3).flatten(-2)


class Mxfp4Weights:
    """X_blocks and X_scales of [experts, rows, in / 32] are Blocks X of [experts * rows, in]."""

    linear_layout = False

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.nbytes, self.loaded_bytes = weights.nbytes, weights.loaded_bytes
        stored = set(weights.names())
        self._packed = {
            name.removesuffix(_BLOCKS): name
            for name in stored
            if name.endswith(_BLOCKS) and name.removesuffix(_BLOCKS) + _SCALES in stored
        }
        hidden = {name for whole in self._packed for name in (whole + _BLOCKS, whole + _SCALES)}
        self._names = [*self._packed, *(name for name in weights.names() if name not in hidden)]
        self._last: tuple[str, Blocks] | None = None  # its experts are asked for one after the other

    def names(self) -> Iterable[str]:
        return self._names

    def get(self, name: str) -> Tensor | Blocks:
        if name not in self._packed:
            return self._weights.get(name)
        if self._last is None or self._last[0] != name:
            blocks, scales = self._weights.get(name + _BLOCKS), self._weights.get(name + _SCALES)
            if isinstance(blocks, Blocks) or isinstance(scales, Blocks):
                raise CheckpointError(
                    f"{name}: its blocks and scales are quantised once more; MXFP4 stores them as plain uint8"
                )
            self._last = (name, Blocks(mxfp4_of(blocks, scales, name), "mxfp4", 32 * scales.shape[-1]))
        return self._last[1]
