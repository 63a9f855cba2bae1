"""Integers with scales and zero points, as other libraries store them, in the smallest block format that has exactly their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.quantization.scaled_blocks import join, nibbles_of

_BLOCK, _SUPER_BLOCK = 32, 256
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word, where each of 8 neighbours lies


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """uint8 of int32 `words` [.., n, ..] that hold integers of 2, 3, 4 or 8 bits along `dim`, the lowest first: [.., n * 32 / bits, ..].

    Integers of 3 bits run on from one word to the next."""
    words = words.movedim(dim, 0)
    count = words.shape[0] * 32 // bits
    if bits == 3:
        wide = words.long() & 0xFFFFFFFF
        places = bits * torch.arange(count)
        shifts = (places % 32).view(-1, *(1 for _ in words.shape[1:]))
        following = torch.cat([wide, wide[:1]])  # the last integer ends with its word
        both = wide[places // 32] | following[places // 32 + 1] << 32
        found = ((both >> shifts) & 7).to(torch.uint8)
    else:
        # The bytes of a word are its integers in order, on the little-endian machines that this runs on.
        of_bytes = _bytes(words).view(*words.shape, 4).movedim(-1, 1)
        parts = [(of_bytes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)] if bits < 8 else [of_bytes]
        found = torch.stack(parts, 2).flatten(0, 2)
    return found.movedim(0, dim)


def unpack_awq(words: Tensor) -> Tensor:
    """uint8 [n, 8 * words] of int32 [n, words], whose nibbles are those of 8 neighbours in AWQ's order."""
    nibbles = unpack_words(words, 4, 1).unflatten(1, (-1, 8))
    return nibbles[..., list(_AWQ_PLACES)].flatten(1)


def expand_groups(x: Tensor, columns: int) -> Tensor:
    """[out, groups] -> [out, columns]"""
    return x.repeat_interleave(columns // x.shape[1], 1)


def dequantize_integers(q: Tensor, scale: Tensor, zero: Tensor | None, groups: Tensor | None = None) -> Tensor:
    """fp32 [out, in] of q [out, in], scale and zero [out, groups]; groups: int64 [in], of each column, None: neighbours share one."""
    columns = q.shape[1]

    def of_columns(x: Tensor) -> Tensor:
        return expand_groups(x, columns) if groups is None else x[:, groups]

    centred = q.float() if zero is None else q.float() - of_columns(zero.float())
    return of_columns(scale.float()) * centred


def blocks_of_integers(q: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[str, Tensor] | None:
    """(format, blocks) of weights scale * (q - zero): q uint8 [out, in], scale [out, groups], floating, zero [out, groups], integers of
    0..256. None where no format has a place for them: rows, or groups, that are not whole blocks of 32 columns."""
    out, columns = q.shape
    group = columns // scale.shape[1]
    if columns % _BLOCK or group % _BLOCK:
        return None
    count = columns // _BLOCK
    wide = scale.float()
    half = scale.half()
    fits_half = bool((half.float() == wide).all())
    first = int(zero.reshape(-1)[0])
    same = bool((zero == first).all())

    def of_blocks(x: Tensor) -> Tensor:
        return expand_groups(x, count)

    if bits <= 4 and fits_half:
        if same and first <= 8 and 2**bits - 1 + 8 - first <= 15:
            return "q4_0", _join(_bytes(of_blocks(half)), nibbles_of(q + (8 - first)), 16)
        return "q4_z", join("q4_z", nibbles_of(q), of_blocks(half), of_blocks(zero.half()))
    if same and 2**bits - 1 - first <= 127 and first <= 128:
        centred = (q.to(torch.int16) - first).to(torch.int8).view(torch.uint8)
        if fits_half:
            return "q8_0", _join(_bytes(of_blocks(half)), centred, 32)
        if group % _SUPER_BLOCK == 0:
            supers = columns // _SUPER_BLOCK
            ones = torch.ones(out, supers, 16, dtype=torch.uint8)
            d = _bytes(expand_groups(wide, supers)).view(out, supers, 4)
            return "q8_k", torch.cat([d, ones, centred.view(out, supers, _SUPER_BLOCK)], 2).flatten(1)
    return "q8_z", join("q8_z", q, of_blocks(wide), of_blocks(zero.half()))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _join(d: Tensor, quants: Tensor, size: int) -> Tensor:
    """Blocks uint8 [out, bytes] of the bytes of fp16 d [out, 2 blocks] and quants [out, size blocks]."""
    out = len(quants)
    return torch.cat([d.view(out, -1, 2), quants.view(out, -1, size)], 2).view(out, -1)


def blocks_with_minimum(q: Tensor, scale: Tensor, minimum: Tensor, bits: int) -> tuple[str, Tensor] | None:
    """(format, blocks) of weights scale * q + minimum, see `blocks_of_integers`; None also where fp16 has not exactly both numbers."""
    columns = q.shape[1]
    if columns % _BLOCK or columns // scale.shape[1] % _BLOCK:
        return None
    if any(bool((x.half().float() != x.float()).any()) for x in (scale, minimum)):
        return None
    d, m = (expand_groups(x.half(), columns // _BLOCK) for x in (scale, minimum))
    if bits == 8:
        return "q8_m", join("q8_m", q, d, m)
    numbers = torch.stack([d, m], 2).view(torch.uint8)
    return "q4_1", torch.cat([numbers, nibbles_of(q).view(len(q), -1, 16)], 2).flatten(1)


def blocks_of_floats(codes: Tensor, scale: Tensor) -> Tensor | None:
    """Blocks of f8 with weights scale * codes: codes e4m3 [out, in], scale fp32 [out, n], of neighbouring columns each; None where those
    are not whole blocks of 64."""
    columns = codes.shape[1]
    if columns % 64 or columns // scale.shape[1] % 64 or columns % scale.shape[1]:
        return None
    return join("f8", codes.contiguous().view(torch.uint8), expand_groups(scale.float(), columns // 64))
