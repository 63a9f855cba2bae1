"""gpt-oss's experts in MXFP4 (OCP Microscaling Formats 1.0): 4-bit floats with a power of two for each 32, as blocks of q8_0.

A value is t[q] * 2**(e - 128), where t holds the doubled e2m1 values 0 1 2 3 4 6 8 12 and their negatives: exactly what a block of
q8_0 with the integers t[q] and the fp16 scale 2**(e - 128) is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError
from foveate.models.checkpoint.base import Blocks, Weights

_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_BLOCKS, _SCALES = "_blocks", "_scales"
_LEAST, _MOST = 128 - 24, 128 + 15  # exponents whose power of two fp16 holds exactly


def q8_0_of(blocks: Tensor, scales: Tensor, what: str) -> Tensor:
    """uint8 [..., in / 32, 16] (even elements in the low nibbles) and [..., in / 32] -> blocks of q8_0, uint8 [rows, in / 32 * 34]."""
    if blocks.dtype is not torch.uint8 or scales.dtype is not torch.uint8 or blocks.shape != (*scales.shape, 16):
        raise CheckpointError(
            f"{what} has blocks of {blocks.dtype} {list(blocks.shape)} and scales of {scales.dtype} {list(scales.shape)}; MXFP4 needs "
            "uint8 [..., 16] and uint8 [...]"
        )
    table = torch.tensor(_TWICE, dtype=torch.int8)
    integers = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1).flatten(-2)
    used = integers.ne(0).any(-1)
    if bool(((scales < _LEAST) | (scales > _MOST))[used].any()):
        raise CheckpointError(
            f"{what} has scales beyond 2**-24 to 2**15, which cannot be packed here; take another file of the model"
        )
    exponents = torch.where(used, scales, torch.full_like(scales, 128)).float() - 128
    d = torch.exp2(exponents).half()[..., None].view(torch.uint8)
    return torch.cat([d, integers.view(torch.uint8)], -1).flatten(0, -3).flatten(-2)


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
            assert isinstance(blocks, Tensor) and isinstance(scales, Tensor)
            self._last = (name, Blocks(q8_0_of(blocks, scales, name), "q8_0", 32 * scales.shape[-1]))
        return self._last[1]
