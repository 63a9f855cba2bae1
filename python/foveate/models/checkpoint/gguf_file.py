"""GgufFile: the header of a GGUF file, and its tensors as views of the memory-mapped file.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Read here rather than by the gguf library, whose reader makes
several numpy arrays for each of the 100,000 strings of a vocabulary: 1.9 s for SmolLM2's file, against 0.1 s.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from foveate.files.checked import CheckpointError, is_there, shown
from foveate.quantization.gguf_types import BLOCKS

# The numbers of ggml's types.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DIMENSIONS, _NESTED = 4, 4  # ggml's limit of a tensor's dimensions; of arrays in arrays, which no known key has
_NO_LARGER = 2**50  # bytes of a tensor, of a file: whatever is beyond is damaged


class GgufTensor(NamedTuple):
    """shape: slowest dimension first, as torch has it. data: uint8, the bytes in the file; empty for types that cannot be read."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: Tensor


class GgufFile:
    """fields: the metadata by key, as int, float, bool, str and lists of them. tensors: by name. paths: the files that they are in.

    CheckpointError for what is not GGUF of version 2 or 3, for a file that ends too early, and for a header that contradicts itself.
    Nothing is allocated that is larger than the part of the file which says it.
    """

    def __init__(self, path: Path) -> None:
        if not is_there(path):
            raise FileNotFoundError(f"{path} is not there")
        self.path, self.paths, self.size = path, [path], path.stat().st_size
        with path.open("rb") as stream:
            self._bytes = stream.read(min(self.size, 2**24))  # the header; more of it is read when that is not enough
        self._at = 0
        if self._take(4) != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
        version = self._scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"{path} is GGUF of version {version}; versions 2 and 3 (little-endian) can be read")
        tensors, fields = self._scalar("Q"), self._scalar("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            key = self._string()
            if key in self.fields:
                raise self._damaged(f"its header has the key {key[:80]!r} twice")
            self.fields[key] = self._value(self._scalar("I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 8 <= alignment <= 2**16 or alignment % 8:
            raise self._damaged(f"general.alignment is {shown(alignment)}, not a multiple of 8 up to 65536")
        start = -(-self._at // alignment) * alignment
        del self._bytes
        # copy on write: tensors can be changed in memory without changing the file
        self._mapped = torch.from_numpy(np.memmap(path, mode="c"))
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in infos:
            if name in self.tensors:
                raise self._damaged(f"it has the tensor {name[:80]!r} twice")
            if offset % alignment:
                raise self._damaged(
                    f"{name[:80]} begins at byte {offset}, which is not a multiple of the alignment {alignment}"
                )
            self.tensors[name] = GgufTensor(name, kind, shape, self._data(name, shape, kind, start + offset))

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > self.size:
            raise self._damaged(f"its header goes on beyond byte {self.size}")
        if end > len(self._bytes):
            with self.path.open("rb") as stream:
                self._bytes = stream.read(min(self.size, 2 * end))
        taken = self._bytes[self._at : end]
        self._at = end
        return taken

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or damaged: {what}; download it again")

    def _scalar(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", errors="surrogateescape")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._damaged(f"a field before byte {self._at} has the unknown type {kind}")
        kind, count = self._scalar("I"), self._scalar("Q")
        if depth == _NESTED:
            raise self._damaged(f"the field before byte {self._at} has arrays in arrays, {_NESTED} deep")
        size = struct.calcsize("<" + _SCALARS[kind]) if kind in _SCALARS else 8 if kind == _STRING else 12
        if self._at + count * size > self.size:
            raise self._damaged(f"an array of {count} values before byte {self._at} goes on beyond byte {self.size}")
        if kind in _SCALARS:
            return list(struct.unpack(f"<{count}{_SCALARS[kind]}", self._take(count * size)))
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _info(self) -> tuple[str, tuple[int, ...], str, int]:
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= _DIMENSIONS:
            raise self._damaged(
                f"the tensor {name[:80]!r} has {dimensions} dimensions; 1 to {_DIMENSIONS} are possible"
            )
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))[::-1]  # the file has the fastest first
        number, offset = self._scalar("I"), self._scalar("Q")
        if not 0 < math.prod(shape) <= _NO_LARGER:
            raise self._damaged(f"the tensor {name[:80]!r} has the shape {list(shape)}")
        return name, shape, TYPES.get(number, f"number {number}"), offset

    def _data(self, name: str, shape: tuple[int, ...], kind: str, start: int) -> Tensor:
        if kind not in BLOCKS:
            return torch.empty(0, dtype=torch.uint8)
        elements, nbytes = BLOCKS[kind]
        if shape[-1] % elements:
            raise self._damaged(f"the rows of {name}, {shape[-1]} elements, are not whole {kind} blocks")
        nbytes = math.prod(shape) // elements * nbytes
        if start + nbytes > self.size:
            raise self._damaged(f"{name} ends at byte {start + nbytes}, the file at byte {self.size}")
        return self._mapped[start : start + nbytes]
