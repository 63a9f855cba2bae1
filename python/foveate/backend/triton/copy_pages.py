"""Copies of whole pages of a KV cache, all that one step needs in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import on_device

_BLOCK = 1024
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)


@triton.jit(do_not_specialize=["pages", "copies"])
def copy_words(pool, places, pages, copies, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """pool [layers, pages, WORDS]; places [2, copies], the pages to read and the pages to write. No page is in both."""
    copy = tl.program_id(0) % copies
    layer = (tl.program_id(0) // copies).to(tl.int64) * pages
    old, new = tl.load(places + copy), tl.load(places + copies + copy)
    step = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = step < WORDS
    tl.store(
        pool + (layer + new) * WORDS + step, tl.load(pool + (layer + old) * WORDS + step, mask=inside), mask=inside
    )


@on_device
def copy_pages(pool: Tensor, old: Sequence[int], new: Sequence[int]) -> None:
    """pool [layers, pages, ...] contiguous: page new[i] becomes a copy of page old[i] in every layer."""
    layers, pages = pool.shape[:2]
    size = pool[0, 0].numel() * pool.element_size()
    word = next(dtype for dtype in _WORDS if size % dtype.itemsize == 0)
    words = size // word.itemsize
    places = torch.tensor([old, new], dtype=torch.int64, device=pool.device)
    copy_words[(layers * len(old), -(-words // _BLOCK))](
        pool.view(-1).view(word), places, pages, len(old), WORDS=words, BLOCK=_BLOCK
    )
