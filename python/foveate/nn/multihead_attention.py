"""foveate.nn.MultiheadAttention: torch.nn.MultiheadAttention's constructor, state dict and meaning on foveate's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.backend.reference.rows import compute_dtype, safe_softmax
from foveate.ops.attention.sdpa import sdpa


class MultiheadAttention(torch.nn.MultiheadAttention):
    """concat(head_1, ..., head_h) @ W_out, head_i = attention(query @ W_q_i, key @ W_k_i, value @ W_v_i) (arXiv 1706.03762).

    The constructor is torch.nn.MultiheadAttention's, and state dicts load both ways. With need_weights=False the heads run in
    `foveate.sdpa` without storing the weights; with need_weights=True (torch's default) the [N, heads, L, S] weights are computed
    in plain torch, because they are the result. A query row whose keys are all masked gives 0, in the weights too, where torch's
    weights are NaN. Nested tensors are refused.

    Inside torch.nn.TransformerEncoderLayer in eval mode, torch's fast path reads this module's parameters and never calls it:
    torch.backends.mha.set_fastpath_enabled(False) prevents that.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """query [L, N, E], key [S, N, kdim], value [S, N, vdim]; [N, L, E] and so on with batch_first; [L, E] and so on unbatched.

        key_padding_mask: [N, S], unbatched [S]; attn_mask: [L, S] or [N * heads, L, S]. A bool mask is True where attention is NOT
        allowed; a float mask is added to the scores. is_causal says that attn_mask is the (top-left) causal mask, and needs it;
        the keys of add_bias_kv and add_zero_attn are seen by every query all the same.
        Returns the output in query's layout, and weights [N, L, S] (averaged over heads), [N, heads, L, S] without
        average_attn_weights, or None without need_weights.
        """
        batched = self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        more_keys = self.bias_k is not None or self.add_zero_attn  # behind the others, and seen by every query
        if is_causal and key_padding_mask is None and not need_weights and not more_keys:
            attn_mask = None
        else:
            is_causal = False
        q, k, v = self._project(query, key, value, batched)  # [N, heads, L or S, head_dim]
        N, L, S = q.shape[0], q.shape[2], k.shape[2]
        masks = []
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.view(N, self.num_heads, L, S)
            masks.append(attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask.view(N, 1, 1, S))
        k, v, extra = self._extend(k, v)
        mask = _merge([F.pad(mask, (0, extra)) for mask in masks] if extra else masks, q.dtype)
        dropout_p = self.dropout if self.training else 0.0

        weights = None
        if need_weights:
            out, weights = _explicit(q, k, v, mask, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            out = sdpa(q, k, v, mask, dropout_p, is_causal)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out[0], weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> bool:
        """True if the input is batched."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "foveate.nn.MultiheadAttention takes no nested tensors; pad them and pass key_padding_mask"
            )
        rank = query.dim()
        if rank not in (2, 3) or key.dim() != rank or value.dim() != rank:
            raise ValueError(
                "query, key and value must all have three dimensions, or two without a batch; got shapes "
                f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
            )
        sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
        if sizes != (self.embed_dim, self.kdim, self.vdim):
            raise ValueError(
                f"query, key and value have {sizes} features; this module has {(self.embed_dim, self.kdim, self.vdim)}"
            )
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (rank == 3 and key.shape[batch] != query.shape[batch]):
            raise ValueError(
                "key and value must agree in length, and all three in batch size; got shapes "
                f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
            )
        sequence = 0 if rank == 2 or not self.batch_first else 1
        L, S, N = query.shape[sequence], key.shape[sequence], query.shape[batch] if rank == 3 else 1
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True says what attn_mask is, so attn_mask must be given as well")
        for name, mask, shapes in (
            ("key_padding_mask", key_padding_mask, [(N, S) if rank == 3 else (S,)]),
            ("attn_mask", attn_mask, [(L, S), (N * self.num_heads, L, S)]),
        ):
            if mask is None:
                continue
            if mask.dtype is not torch.bool and not mask.is_floating_point():
                raise ValueError(
                    f"{name} has dtype {mask.dtype}; it must be bool (True = not allowed) or floating (added)"
                )
            if tuple(mask.shape) not in shapes:
                raise ValueError(
                    f"{name} has shape {list(mask.shape)}, expected {' or '.join(str(list(s)) for s in shapes)}"
                )
        return rank == 3

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> list[Tensor]:
        """The heads of query, key and value: [N, heads, length, head_dim] each."""
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
        elif query is key and key is value:
            projected = list(F.linear(query, self.in_proj_weight, bias).chunk(3, -1))
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            weights = self.in_proj_weight.chunk(3)
            projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
        if not batched:
            projected = [x[None] for x in projected]
        elif not self.batch_first:
            projected = [x.transpose(0, 1) for x in projected]
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in projected]

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with the learned key of add_bias_kv and the zero key of add_zero_attn at their ends, and how many those are."""
        N = k.shape[0]
        extra_k: list[Tensor] = []
        extra_v: list[Tensor] = []
        if self.bias_k is not None and self.bias_v is not None:
            for extra, bias in ((extra_k, self.bias_k), (extra_v, self.bias_v)):
                extra.append(bias.view(1, self.num_heads, 1, self.head_dim).expand(N, -1, -1, -1).to(k.dtype))
        if self.add_zero_attn:
            for extra, x in ((extra_k, k), (extra_v, v)):
                extra.append(x.new_zeros(N, self.num_heads, 1, self.head_dim))
        if not extra_k:
            return k, v, 0
        return torch.cat([k, *extra_k], 2), torch.cat([v, *extra_v], 2), len(extra_k)


def _merge(masks: list[Tensor], dtype: torch.dtype) -> Tensor | None:
    """One mask in the sense of sdpa, bool with True = keep or floating, of masks in the sense of this module."""
    if not masks:
        return None
    if all(mask.dtype is torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    floating = [
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
        if mask.dtype is torch.bool
        else mask.to(dtype)
        for mask in masks
    ]
    return floating[0] if len(floating) == 1 else floating[0] + floating[1]


def _explicit(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
    """Output [N, heads, L, head_dim] and weights [N, heads, L, S], as torch computes them: dropout is seen in the weights."""
    dtype = compute_dtype(q)
    s = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).mT
    if mask is not None:
        s = s.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else s + mask
    weights = safe_softmax(s)[0]
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    weights = weights.to(q.dtype)
    return weights @ v, weights
