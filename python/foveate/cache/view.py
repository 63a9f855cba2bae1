"""foveate.CacheView: what a model's forward sees of a KV cache: some sequences, one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.cache.paged import PagedKVCache
from foveate.ops.attention.with_kv_cache import attention_with_kv_cache


class _Step:
    """One step of a batch over a cache. lens: int32 [B], the tokens of each sequence before it; block_table: int32 [B, pages]."""

    def __init__(self, cache: PagedKVCache, lens: Tensor, block_table: Tensor, new: int) -> None:
        self.cache, self.lens, self.block_table, self.new = cache, lens, block_table, new

    @property
    def capacity(self) -> int:
        """Tokens that the pages of the block table hold: no position of this step is beyond."""
        return self.block_table.shape[1] * self.cache.page_size

    def positions(self) -> Tensor:
        """int64 [B, new], the position of each new token in its sequence."""
        return self.lens[:, None].long() + torch.arange(self.new, device=self.lens.device)


class CacheView(_Step):
    """One step of the sequences `seqs` of a PagedKVCache, in the order of the batch. `cache.append(seqs, new)` has been called.

    lens: int32 [B], the tokens of each sequence before this step. block_table: int32 [B, pages].
    prompt: whether the new tokens are a prompt's. Kernels that attend otherwise for prompts go by it, so that bits do not depend on how
    a prompt is divided into steps; None: they go by the number of tokens.
    """

    def __init__(self, cache: PagedKVCache, seqs: Sequence[int], new: int, prompt: bool | None = None) -> None:
        self.seqs, self.prompt = list(seqs), prompt
        super().__init__(cache, cache.kv_lens(self.seqs) - new, cache.block_table(self.seqs), new)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`attention_with_kv_cache` of q [B, new, Hq, D], after k, v [B, new, Hkv, D or Dv] were written; options: its own, but for
        return_lse."""
        return self.cache.attend(layer, q, k, v, seqs=self.seqs, **options)


class StaticCacheView(_Step):
    """One new token of each of B rows of a cache, told by tensors alone, so that a CUDA graph can hold the step.

    lens: int32 [B], the tokens before this one; block_table: int32 [B, pages], as `attention_with_kv_cache` takes them. Nothing here
    reads them on the host, or checks that the page of the new token may be written: their owner does.
    """

    def __init__(self, cache: PagedKVCache, lens: Tensor, block_table: Tensor) -> None:
        super().__init__(cache, lens, block_table, 1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        cache = self.cache
        return attention_with_kv_cache(
            q, cache.k_pages[layer], cache.v_pages[layer], k=k, v=v, kv_lens=self.lens, block_table=self.block_table,
            k_scale=None if cache.k_scale is None else cache.k_scale[layer],
            v_scale=None if cache.v_scale is None else cache.v_scale[layer], return_lse=False, **options,
        )  # fmt: skip
