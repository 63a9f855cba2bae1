"""GGUF's tensor types: which stay packed as they are, which are repacked without a change of any weight, and which are expanded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.quantization.k_blocks import q3_to_q6

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Types that are block formats of packed layers.
PACKED = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1", "Q4_K": "q4_k", "Q5_K": "q5_k", "Q6_K": "q6_k"}
# (elements, bytes) of a block. The sizes are ggml's.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ1_S": (256, 50),
    "IQ1_M": (256, 56), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17),
}  # fmt: skip

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml-common.h's kvalues_iq4nl


def _q8_0(d: Tensor, q: Tensor) -> Tensor:
    """Blocks of q8_0, uint8 [n, 34], of the bytes of d [n, 2] and integers [n, 32]."""
    return torch.cat([d, q.to(torch.int8).view(torch.uint8)], 1)


def _from_q5_0(blocks: Tensor) -> Tensor:
    d, upper, lower = blocks.split([2, 4, 16], 1)
    fifth = torch.cat([(upper[:, i, None] >> torch.arange(8, dtype=torch.uint8)) & 1 for i in range(4)], 1)
    return _q8_0(d, (torch.cat([lower & 15, lower >> 4], 1) | fifth << 4).to(torch.int8) - 16)


def _from_iq4_nl(blocks: Tensor) -> Tensor:
    d, q = blocks.split([2, 16], 1)
    return _q8_0(d, torch.tensor(_IQ4_NL, dtype=torch.int8)[torch.cat([q & 15, q >> 4], 1).long()])


def _from_tq2_0(blocks: Tensor) -> Tensor:
    q, d = blocks.split([64, 2], 1)
    q = torch.stack([(half >> 2 * i) & 3 for half in q.split(32, 1) for i in range(4)], 1)
    return _q8_0(d.repeat_interleave(8, 0), q.reshape(-1, 32).to(torch.int8) - 1)


def _of_rows(convert: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: convert(rows.reshape(-1, size)).view(len(rows), -1)


# Types whose weights are exactly those of a block format: the format, and how the bytes [rows, bytes] become its.
REPACKED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "Q3_K": ("q6_k", q3_to_q6),
    "Q5_0": ("q8_0", _of_rows(_from_q5_0, 22)),
    "IQ4_NL": ("q8_0", _of_rows(_from_iq4_nl, 18)),
    "TQ2_0": ("q8_0", _of_rows(_from_tq2_0, 66)),
}


def loaded_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """What a tensor takes in memory, where floats and expanded types become fp32."""
    stored = {"q8_0": "Q8_0", "q6_k": "Q6_K"}[REPACKED[kind][0]] if kind in REPACKED else kind
    elements, size = BLOCKS[stored] if kind in PACKED or kind in REPACKED else (1, 4)
    return math.prod(shape) // elements * size


def expand(data: Tensor, kind: str, shape: tuple[int, ...]) -> Tensor:
    """fp32 of a type that has no packed kernel, by the gguf library."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f'tensors of type {kind} are expanded by the gguf library, which is not installed: pip install "foveate[models]"'
        ) from error
    library: Any = gguf
    rows = data.view(shape[0] if len(shape) > 1 else 1, -1).numpy()
    return torch.from_numpy(library.dequantize(rows, library.GGMLQuantizationType[kind])).view(shape)
