"""vLLM's attention backend for CPUs on foveate's kernels; needs vLLM 0.32.

The cache of a layer is what vLLM allocates, [blocks, Hkv, 2 * block_size, D]: of each block and head the keys, then the values. vLLM's
kernels order them by instruction set; here they lie as they are, so what one backend has written the other cannot read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from foveate.ops.attention.with_kv_cache import attention_with_kv_cache

logger = init_logger("vllm.foveate.cpu_attention")


@dataclass
class Requests:
    """Consecutive requests of a batch with equally many new tokens, as `attention_with_kv_cache` takes them.

    tokens: theirs in the batch, count * new of them. block_table: int32 [count, blocks]. kv_lens: [count], with the new tokens;
    before: without.
    """

    count: int
    new: int
    tokens: slice
    block_table: Tensor
    kv_lens: Tensor
    before: Tensor


@dataclass
class Metadata(CPUAttentionMetadata):
    requests: list[Requests] = field(default_factory=list)


class MetadataBuilder(CPUAttentionMetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        """Once for each batch; all layers use it."""
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu[: common_attn_metadata.num_reqs + 1].tolist()
        return Metadata(**vars(made), requests=_by_new_tokens(starts, made.seq_lens, made.block_table))


def _by_new_tokens(starts: list[int], seq_lens: Tensor, block_table: Tensor) -> list[Requests]:
    groups, first = [], 0
    for new, group in groupby(end - start for start, end in pairwise(starts)):
        count = len(list(group))
        rows = slice(first, first + count)
        if new > 0:
            lens = seq_lens[rows]
            tokens = slice(starts[first], starts[first + count])
            groups.append(Requests(count, new, tokens, block_table[rows], lens, lens - new))
        first += count
    return groups


class Attention(CPUAttentionBackendImpl):
    """refused: why vLLM's own kernels compute this layer, None where foveate's do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.refused: str | None = None
        if self.attn_type != AttentionType.DECODER:
            self.refused = (
                f"its attention is of the type {self.attn_type}, and foveate's plug-in has the decoder's only"
            )
        elif self.is_fp8_kv_cache:
            self.refused = f"its cache is of {self.kv_cache_dtype}, whose scales foveate's kernels keep in another way"
        if self.refused is not None:
            logger.warning_once("a layer stays on vLLM's own attention: %s", self.refused)
        self.window = None if self.sliding_window < 0 else (self.sliding_window - 1, 0)

    def do_kv_cache_update(
        self, layer: torch.nn.Module, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """`forward` appends the keys and values itself."""
        if self.refused is not None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query [tokens, Hq, D], key and value [tokens, Hkv, D]; written to `output`, which is returned. attn_metadata: None warms up."""
        if (
            self.refused is not None
            or attn_metadata is None
            or output_scale is not None
            or output_block_scale is not None
        ):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if attn_metadata.dynamic_causal is not None:
            raise NotImplementedError(
                "some tokens of this batch see later ones, as those of an image do, which foveate's plug-in has not; "
                "leave foveate out of VLLM_PLUGINS"
            )
        k_cache, v_cache = _keys_and_values(kv_cache)
        out = output.view(-1, self.num_heads, self.head_size)
        sinks = None if self.sinks is None else self.sinks.float()  # not before: they are loaded after __init__
        owns_cache = self.kv_sharing_target_layer_name is None
        for requests in attn_metadata.requests:
            shape = (requests.count, requests.new)
            new = {}
            if owns_cache:
                new = {"k": key[requests.tokens].unflatten(0, shape), "v": value[requests.tokens].unflatten(0, shape)}
            attended = attention_with_kv_cache(
                query[requests.tokens].unflatten(0, shape), k_cache, v_cache, **new,
                kv_lens=requests.before if owns_cache else requests.kv_lens, block_table=requests.block_table,
                causal=attn_metadata.causal, window=self.window, scale=self.scale, softcap=self.logits_soft_cap or None,
                alibi_slopes=self.alibi_slopes, sinks=sinks,
            )  # fmt: skip
            out[requests.tokens] = cast(Tensor, attended).flatten(0, 1)
        return output


def _keys_and_values(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """[blocks, block_size, Hkv, D] each, over vLLM's memory."""
    blocks, heads, block_size, _ = kv_cache.shape
    keys, values = kv_cache.view(blocks, heads, 2 * block_size, -1).transpose(1, 2).split(block_size, dim=1)
    return keys, values


class FoveateAttention(CPUAttentionBackend):
    """In the place of CPU_ATTN, under whose name vLLM knows it: on CPUs it takes no backend of another name."""

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        return MetadataBuilder
