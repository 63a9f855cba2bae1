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

# The numbers of ggml's types, for names in messages; those that can be read have (elements, bytes) of a block.
TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
BLOCKS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20)}

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GgufTensor(NamedTuple):
    """shape: slowest dimension first, as torch has it. data: uint8, the bytes in the file; empty for types that cannot be read."""

    name: str
    kind: str
    shape: tuple[int, ...]
    data: Tensor


class GgufFile:
    """fields: the metadata by key, as int, float, bool, str and lists of them. tensors: by name.

    ValueError for what is not GGUF of version 2 or 3, and for a file that ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        with path.open("rb") as stream:
            self._bytes = stream.read(min(self.size, 2**24))  # the header; more of it is read when that is not enough
        self._at = 0
        if self._take(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file: it does not start with 'GGUF'")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{path} is GGUF of version {version}; versions 2 and 3 (little-endian) can be read")
        tensors, fields = self._scalar("Q"), self._scalar("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            key = self._string()
            self.fields[key] = self._value(self._scalar("I"))
        infos = [self._info() for _ in range(tensors)]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._truncated(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        del self._bytes
        # copy on write: tensors can be changed in memory without changing the file
        self._mapped = torch.from_numpy(np.memmap(path, mode="c"))
        self.tensors = {}
        for name, shape, kind, offset in infos:
            self.tensors[name] = GgufTensor(name, kind, shape, self._data(name, shape, kind, start + offset))

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > self.size:
            raise self._truncated(f"its header goes on beyond byte {self.size}")
        if end > len(self._bytes):
            with self.path.open("rb") as stream:
                self._bytes = stream.read(min(self.size, 2 * end))
        taken = self._bytes[self._at : end]
        self._at = end
        return taken

    def _truncated(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is truncated or damaged: {what}; download it again")

    def _scalar(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", errors="surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._truncated(f"a field before byte {self._at} has the unknown type {kind}")
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            form = f"<{count}{_SCALARS[kind]}"
            return list(struct.unpack(form, self._take(struct.calcsize(form))))
        return [self._value(kind) for _ in range(count)]

    def _info(self) -> tuple[str, tuple[int, ...], str, int]:
        name, dimensions = self._string(), self._scalar("I")
        shape = struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))[::-1]  # the file has the fastest first
        number, offset = self._scalar("I"), self._scalar("Q")
        return name, shape, TYPES.get(number, f"number {number}"), offset

    def _data(self, name: str, shape: tuple[int, ...], kind: str, start: int) -> Tensor:
        if kind not in BLOCKS:
            return torch.empty(0, dtype=torch.uint8)
        elements, nbytes = BLOCKS[kind]
        if shape and shape[-1] % elements:
            raise self._truncated(f"the rows of {name}, {shape[-1]} elements, are not whole {kind} blocks")
        nbytes = math.prod(shape) // elements * nbytes
        if start + nbytes > self.size:
            raise self._truncated(f"{name} ends at byte {start + nbytes}, the file at byte {self.size}")
        return self._mapped[start : start + nbytes]
