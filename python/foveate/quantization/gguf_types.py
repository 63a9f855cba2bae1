"""GGUF's tensor types: which stay packed as they are, which are repacked without a change of any weight, and which are expanded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.quantization.gguf_blocks import block_size
from foveate.quantization.k_blocks import q3_to_q6

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Types that are block formats of packed layers.
PACKED = {name.upper(): name for name in ("q8_0", "q4_0", "q4_1", "iq4_nl", "q2_k", "q4_k", "q5_k", "q6_k", "iq4_xs")}
# (elements, bytes) of a block. The sizes are ggml's.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82), "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ1_S": (256, 50),
    "IQ1_M": (256, 56), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17),
}  # fmt: skip


def _q8_0(d: Tensor, q: Tensor) -> Tensor:
    """Blocks of q8_0, uint8 [n, 34], of the bytes of d [n, 2] and integers [n, 32]."""
    return torch.cat([d, q.to(torch.int8).view(torch.uint8)], 1)


def _five_bits(upper: Tensor, lower: Tensor) -> Tensor:
    fifth = torch.cat([(upper[:, i, None] >> torch.arange(8, dtype=torch.uint8)) & 1 for i in range(4)], 1)
    return torch.cat([lower & 15, lower >> 4], 1) | fifth << 4


def _from_q5_0(blocks: Tensor) -> Tensor:
    d, upper, lower = blocks.split([2, 4, 16], 1)
    return _q8_0(d, _five_bits(upper, lower).to(torch.int8) - 16)


def _from_q5_1(blocks: Tensor) -> Tensor:
    d_and_m, upper, lower = blocks.split([4, 4, 16], 1)
    return torch.cat([d_and_m, _five_bits(upper, lower)], 1)


def _q4_0(d: Tensor, q: Tensor) -> Tensor:
    """Blocks of q4_0, uint8 [8 n, 18], of the bytes of d [n, 2] and trits 0..2 [n, 256]."""
    q = q.reshape(-1, 32) + 7
    return torch.cat([d.repeat_interleave(8, 0), q[:, :16] | q[:, 16:] << 4], 1)


def _from_tq2_0(blocks: Tensor) -> Tensor:
    q, d = blocks.split([64, 2], 1)
    q = torch.stack([(half >> 2 * i) & 3 for half in q.split(32, 1) for i in range(4)], 1)
    return _q4_0(d, q)


def _from_tq1_0(blocks: Tensor) -> Tensor:
    """A byte is the five trits of a number below 3**5, scaled up to 2**8: digit by digit, 3 times its fraction."""
    first, second, last, d = blocks.split([32, 16, 4, 2], 1)
    trits = [
        torch.stack([(((part * 3**i).short() & 255) * 3) >> 8 for i in range(count)], 1).flatten(1)
        for part, count in ((first.short(), 5), (second.short(), 5), (last.short(), 4))
    ]
    return _q4_0(d, torch.cat(trits, 1).to(torch.uint8))


def _from_mxfp4(blocks: Tensor) -> Tensor:
    e, q = blocks.split([1, 16], 1)
    return torch.cat([mxfp4_scale(e, (q & 0x77).ne(0).any(1, keepdim=True)), q], 1)


def mxfp4_scale(e: Tensor, used: Tensor) -> Tensor:
    """The bytes of 2**(e - 128) as fp16, uint8 [..., 2], of e uint8 [..., 1]; a block whose weights are all 0 may have any scale.
    ValueError where fp16 does not have it exactly."""
    if bool((((e < 128 - 24) | (e > 128 + 15)) & used).any()):
        raise ValueError("scales beyond 2**-24 to 2**15")
    return torch.exp2(torch.where(used, e, 128).float() - 128).half().contiguous().view(torch.uint8)


# The types with codebooks: where d lies in a block, the bytes of d = 1, what d is divided by, and the scales as integers.
def _scales_in_words(at: int) -> Callable[[Tensor], Tensor]:
    """Reads scales of 32 weights each, in the upper four bits of words."""

    def scales(blocks: Tensor) -> Tensor:
        words = blocks[:, at + 3 :: 8] if at == 6 else blocks[:, at + 3 :: 4]
        return (words >> 4).repeat_interleave(2, 1)

    return scales


def _scales_in_nibbles(at: int, repeats: int) -> Callable[[Tensor], Tensor]:
    def scales(blocks: Tensor) -> Tensor:
        found = blocks[:, at : at + 8 // repeats]
        return torch.stack([found & 15, found >> 4], 2).flatten(1).repeat_interleave(repeats, 1)

    return scales


def _scales_of_iq1_s(blocks: Tensor) -> Tensor:
    return ((blocks[:, 35::2] >> 4) & 7).repeat_interleave(2, 1)


def _scales_of_iq1_m(blocks: Tensor) -> Tensor:
    words = blocks[:, 48::2].short() | blocks[:, 49::2].short() << 8
    return torch.stack([(words >> 3 * i) & 7 for i in range(4)], 2).flatten(1).to(torch.uint8)


class _Codebook(NamedTuple):
    """unit: d is divided by it, so that all else are integers. scales: of the bytes [n, size], uint8 [n, 16], s of 2 s + 1."""

    unit: int
    scales: Callable[[Tensor], Tensor]


_CODEBOOKS = {
    "IQ2_XXS": _Codebook(8, _scales_in_words(6)), "IQ2_XS": _Codebook(8, _scales_in_nibbles(66, 1)),
    "IQ2_S": _Codebook(8, _scales_in_nibbles(74, 1)), "IQ3_XXS": _Codebook(4, _scales_in_words(66)),
    "IQ3_S": _Codebook(1, _scales_in_nibbles(106, 2)), "IQ1_S": _Codebook(8, _scales_of_iq1_s), "IQ1_M": _Codebook(8, _scales_of_iq1_m),
}  # fmt: skip


def _of_codebook(kind: str) -> Callable[[Tensor], Tensor]:
    """Blocks of q8_k. The codebooks are the gguf library's: what it makes of the block with d = 1 is integers over `unit`."""
    codebook, size = _CODEBOOKS[kind], BLOCKS[kind][1]

    def convert(blocks: Tensor) -> Tensor:
        if kind == "IQ1_M":  # the nibbles of d are the upper ones of four words
            bits = blocks[:, 49::2].short() >> 4
            d = (bits[:, 0] | bits[:, 1] << 4 | bits[:, 2] << 8 | bits[:, 3] << 12).contiguous().view(torch.float16)
            plain = blocks.clone()
            plain[:, 49::2] = (blocks[:, 49::2] & 15) | torch.tensor([0, 0, 0xC0, 0x30], dtype=torch.uint8)
        else:
            d = blocks[:, :2].contiguous().view(torch.float16)[:, 0]
            plain = torch.cat([torch.tensor([[0, 0x3C]], dtype=torch.uint8).expand(len(blocks), 2), blocks[:, 2:]], 1)
        scales = 2 * codebook.scales(blocks).to(torch.int8) + 1
        values = expand(plain, kind, (len(blocks), 256)).view(-1, 16, 16)
        q = (values * codebook.unit / scales[..., None]).round().to(torch.int8).flatten(1)
        return torch.cat(
            [(d.float() / codebook.unit)[:, None].view(torch.uint8), scales.view(torch.uint8), q.view(torch.uint8)], 1
        )

    return _of_rows(convert, size)


def _of_rows(convert: Callable[[Tensor], Tensor], size: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: convert(rows.reshape(-1, size)).view(len(rows), -1)


# Types whose weights are exactly those of a block format: the format, and how the bytes [rows, bytes] become its.
REPACKED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "Q3_K": ("q6_k", q3_to_q6),
    "Q5_0": ("q8_0", _of_rows(_from_q5_0, 22)),
    "Q5_1": ("q8_m", _of_rows(_from_q5_1, 24)),
    "TQ1_0": ("q4_0", _of_rows(_from_tq1_0, 54)),
    "TQ2_0": ("q4_0", _of_rows(_from_tq2_0, 66)),
    "MXFP4": ("mxfp4", _of_rows(_from_mxfp4, 17)),
    **{kind: ("q8_k", _of_codebook(kind)) for kind in _CODEBOOKS},
}


def loaded_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """What a tensor takes in memory, where floats and expanded types become fp32."""
    format = PACKED.get(kind) or (REPACKED[kind][0] if kind in REPACKED else None)
    elements, size = block_size(format) if format is not None else BLOCKS[kind] if kind in FLOATS else (1, 4)
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
