"""foveate.CacheView: what a model's forward sees of a KV cache: some sequences, one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.paged_kv_cache import PagedKVCache


class CacheView:
    """One step of the sequences `seqs` of a PagedKVCache, in the order of the batch. `cache.append(seqs, new)` has been called.

    lens: int32 [B], the tokens of each sequence before this step. block_table: int32 [B, pages].
    """

    def __init__(self, cache: PagedKVCache, seqs: Sequence[int], new: int) -> None:
        self.cache, self.seqs, self.new = cache, list(seqs), new
        self.block_table = cache.block_table(self.seqs)
        self.lens = cache.kv_lens(self.seqs) - new

    def positions(self) -> Tensor:
        """int64 [B, new], the position of each new token in its sequence."""
        return self.lens[:, None].long() + torch.arange(self.new, device=self.lens.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        """`attention_with_kv_cache` of q [B, new, Hq, D], after k, v [B, new, Hkv, D or Dv] were written."""
        return self.cache.attend(layer, q, k, v, seqs=self.seqs, **options)
