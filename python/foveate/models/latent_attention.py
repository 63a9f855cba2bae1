"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds a latent, of which all heads make their keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.cache.view import CacheView
from foveate.models.decoder_config import LlamaConfig
from foveate.models.latent_config import LatentConfig
from foveate.models.layers import RMSNorm
from foveate.models.sequences import PackedSequences, attend
from foveate.nn import PackedLinear
from foveate.ops.rotary import apply_rotary


class LatentAttention(nn.Module):
    """In place of LlamaAttention where the config has `latent`; names are DeepSeek's.

    Without a cache each head's keys and values are made of the latents. With one the latents themselves are keys of one head that all
    query heads share, [rope | latent], and their last elements its values: the matrix that makes keys of latents goes to the query's side,
    q (W c) = (q W) c, and that of the values behind the attention.
    """

    def __init__(self, config: LlamaConfig, latent: LatentConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.latent = config, layer, latent
        c, hidden, heads = latent, config.hidden_size, config.num_heads
        of_queries = heads * (c.nope + c.rope)
        if c.query_rank is None:
            self.q_proj = nn.Linear(hidden, of_queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, c.query_rank, bias=config.qkv_bias)
            self.q_a_layernorm = RMSNorm(c.query_rank, config.latent_norm_eps)
            self.q_b_proj = nn.Linear(c.query_rank, of_queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, c.rank + c.rope, bias=config.qkv_bias)
        self.kv_a_layernorm = RMSNorm(c.rank, config.latent_norm_eps)
        self.kv_b_proj = nn.Linear(c.rank, heads * (c.nope + c.value), bias=False)
        self.o_proj = nn.Linear(heads * c.value, hidden, bias=config.o_bias)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: CacheView | None,
        packed: PackedSequences | None = None,
    ) -> Tensor:
        """As LlamaAttention's."""
        c = self.latent
        q = self.q_proj(x) if c.query_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (self.config.num_heads, -1)).split([c.nope, c.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.rank, c.rope], -1)
        latent, k_rope = self.kv_a_layernorm(latent)[:, :, None], k_rope[:, :, None]  # of one head
        scale = self.config.scale
        if cache is not None:
            of_keys, of_values = self.matrices(x.dtype)
            q = torch.cat([q_rope, torch.einsum("bshn,hnr->bshr", q_nope, of_keys)], -1)
            k = torch.cat([k_rope, latent], -1)
            out = cache.attend(
                self.layer, q, k, latent, scale=scale, rotary_cos=cos, rotary_sin=sin, batch_invariant=True,
                rotary_interleaved=self.config.rope_interleaved,
            )  # fmt: skip
            return self.o_proj(torch.einsum("bshr,hvr->bshv", out, of_values).flatten(2))
        if packed is None:
            cos, sin = cos[: x.shape[1]], sin[: x.shape[1]]
        q_rope, k_rope = apply_rotary(q_rope, k_rope, cos, sin, interleaved=self.config.rope_interleaved)
        k_nope, v = (
            self.kv_b_proj(latent[:, :, 0]).unflatten(-1, (self.config.num_heads, -1)).split([c.nope, c.value], -1)
        )
        k_rope = k_rope.expand(*k_nope.shape[:-1], -1)
        dropout_p = self.config.attention_dropout if self.training else 0.0
        options: dict[str, Any] = {"causal": True, "scale": scale, "dropout_p": dropout_p}
        out = attend(torch.cat([q_rope, q_nope], -1), torch.cat([k_rope, k_nope], -1), v, packed, **options)
        return self.o_proj(out.flatten(2))

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What makes keys and values of a latent, [heads, nope, rank] and [heads, value, rank]; a packed one is expanded."""
        linear = self.kv_b_proj
        weight = linear.dequantize() if isinstance(linear, PackedLinear) else linear.weight
        by_head = weight.to(dtype).unflatten(0, (self.config.num_heads, -1))
        of_keys, of_values = by_head.split([self.latent.nope, self.latent.value], 1)
        return of_keys, of_values
