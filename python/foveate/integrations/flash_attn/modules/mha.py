"""flash_attn.modules.mha: MHA and its inner attentions, on every device and dtype of foveate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import foveate
from foveate.integrations.flash_attn._options import Window, window_of
from foveate.integrations.flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from foveate.integrations.flash_attn.layers.rotary import RotaryEmbedding


def get_alibi_slopes(nheads: int) -> list[float]:
    """2 ** (-8 h / n) for h = 1 .. n, n a power of two; other numbers of heads take every second slope of 2 n for the rest."""
    power = 2 ** math.floor(math.log2(nheads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes if power == nheads else slopes + get_alibi_slopes(2 * power)[0::2][: nheads - power]


class _Attention(nn.Module):
    alibi_slopes: Tensor | None

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Window = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale, self.deterministic = causal, softmax_scale, deterministic
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_of(window_size)

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Attention):
    """qkv [B, S, 3, H, D] -> [B, S, H, D]; packed [total, 3, H, D] with cu_seqlens and max_seqlen."""

    def forward(
        self, qkv: Tensor, causal: bool | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Any:
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._options(causal))
        return flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens, _given(max_seqlen, "max_seqlen"), **self._options(causal)
        )


class FlashCrossAttention(_Attention):
    """q [B, Sq, H, D], kv [B, Sk, 2, Hkv, D] -> [B, Sq, H, D]; packed with cu_seqlens, max_seqlen and those of k."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Any:
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self._options(causal))
        lengths = (
            cu_seqlens,
            _given(cu_seqlens_k, "cu_seqlens_k"),
            _given(max_seqlen, "max_seqlen"),
            _given(max_seqlen_k, "max_seqlen_k"),
        )
        return flash_attn_varlen_kvpacked_func(q, kv, *lengths, **self._options(causal))


class CrossAttention(_Attention):
    """q [B, Sq, H, D], kv [B, Sk, 2, Hkv, D], key_padding_mask bool [B, Sk] with True = keep -> [B, Sq, H, D]."""

    def forward(
        self, q: Tensor, kv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        mask = None if key_padding_mask is None else key_padding_mask.bool()[:, None, None]
        options = self._options(causal)
        scale = options.pop("softmax_scale")
        return foveate.attention(q, *kv.unbind(2), mask=mask, scale=scale, window=options.pop("window_size"), **options)


class SelfAttention(CrossAttention):
    """qkv [B, S, 3, H, D]; the rest as `CrossAttention`."""

    def forward(  # type: ignore[override]
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        return super().forward(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask)


def _given(x: Any, name: str) -> Any:
    if x is None:
        raise ValueError(f"cu_seqlens came without {name}")
    return x


class MHA(nn.Module):
    """Multi-head self- or cross-attention with flash_attn's constructor and state dict (Wqkv, or Wq and Wkv; out_proj).

    use_flash_attn chooses no kernel, all run on foveate; as in flash_attn, ALiBi, windows and cu_seqlens need it and key_padding_mask
    excludes it. fused_bias_fc changes nothing.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Window = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_heads_kv = num_heads, num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv or embed_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} must divide embed_dim={embed_dim}, and num_heads_kv={self.num_heads_kv} must divide num_heads"
            )
        if (use_alibi or window_of(window_size) != (-1, -1)) and not use_flash_attn:
            raise ValueError("use_alibi and window_size need use_flash_attn=True")
        if rotary_emb_dim > 0 and cross_attn:
            raise ValueError("rotary_emb_dim: rotary embedding is for self-attention, and cross_attn=True is not")
        self.embed_dim, self.head_dim, self.cross_attn, self.causal = (
            embed_dim,
            embed_dim // num_heads,
            cross_attn,
            causal,
        )
        self.layer_idx, self.dwconv, self.rotary_emb_dim, self.use_flash_attn = (
            layer_idx,
            dwconv,
            rotary_emb_dim,
            use_flash_attn,
        )
        self.return_residual, self.checkpointing = return_residual, checkpointing
        where = {"device": device, "dtype": dtype}
        self.kv_dim = 2 * self.head_dim * self.num_heads_kv
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device
            )
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **where)
            self.Wkv = nn.Linear(embed_dim, self.kv_dim, bias=qkv_proj_bias, **where)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + self.kv_dim, bias=qkv_proj_bias, **where)
        if dwconv:
            parts = {"qkv": embed_dim + self.kv_dim} if self._one_projection else {"q": embed_dim, "kv": self.kv_dim}
            for name, size in parts.items():
                setattr(self, f"dwconv_{name}", nn.Conv1d(size, size, kernel_size=3, padding=2, groups=size, **where))
        slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
        inner: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale, "attention_dropout": dropout}
        inner |= {"window_size": window_size, "alibi_slopes": slopes}
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**inner)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**inner)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **where)

    @property
    def _one_projection(self) -> bool:
        return not self.cross_attn and self.num_heads_kv == self.num_heads

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None) -> Tensor:
        """[batch_size, max_seqlen, 2, Hkv, D], for inference_params.key_value_memory_dict[layer_idx]."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.zeros(shape, dtype=dtype or weight.dtype, device=weight.device)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> Any:
        """x [B, S, E], or [total, E] with cu_seqlens and max_seqlen -> the same shape, or (out, x) with return_residual.

        x_kv [B, Sk, E]: keys and values of cross-attention, x if None. key_padding_mask bool [B, S], True = keep. mixer_subset: the rows
        of x that ask, in cross-attention. inference_params: max_seqlen, max_batch_size, seqlen_offset, lengths_per_sample and
        key_value_memory_dict, into which keys and values are written.
        """
        self._check(key_padding_mask, cu_seqlens, mixer_subset, x_kv, inference_params)
        if self.use_flash_attn:
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        else:
            kwargs["key_padding_mask"] = key_padding_mask
        q, kv = self._project(x, x_kv, mixer_subset)
        if inference_params is not None:
            context = self._attend_to_cache(q, kv, inference_params)
        else:
            if self.rotary_emb_dim > 0:
                q, kv = self.rotary_emb(q, kv)
            inner: nn.Module
            inputs: tuple[Tensor, ...]
            if self._one_projection:
                inner, inputs = self.inner_attn, (torch.cat((q.unsqueeze(-3), kv), -3),)
            else:
                inner, inputs = self.inner_cross_attn, (q, kv)
            if self.checkpointing:
                context = checkpoint(inner, *inputs, use_reentrant=False, **kwargs)
            else:
                context = inner(*inputs, **kwargs)
        out = self.out_proj(context.flatten(-2))
        return (out, x) if self.return_residual else out

    def _check(self, key_padding_mask: Any, cu_seqlens: Any, mixer_subset: Any, x_kv: Any, inference: Any) -> None:
        if cu_seqlens is not None and (not self.use_flash_attn or self.dwconv or self.rotary_emb_dim > 0):
            raise ValueError("cu_seqlens needs use_flash_attn=True, and neither dwconv nor rotary_emb_dim")
        if key_padding_mask is not None and (self.use_flash_attn or inference is not None):
            raise ValueError(
                "key_padding_mask needs use_flash_attn=False and no inference_params; pack the batch with cu_seqlens"
            )
        if not self.cross_attn and (mixer_subset is not None or x_kv is not None):
            raise ValueError("x_kv and mixer_subset belong to cross_attn=True")
        if inference is not None and (cu_seqlens is not None or self.dwconv or self.layer_idx is None):
            raise ValueError("inference_params needs layer_idx in the constructor, and neither cu_seqlens nor dwconv")

    def _project(self, x: Tensor, x_kv: Tensor | None, mixer_subset: Any) -> tuple[Tensor, Tensor]:
        """q [..., H, D] and kv [..., 2, Hkv, D]."""
        if self.cross_attn:
            q = self.Wq(x if mixer_subset is None else x[:, mixer_subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
        else:
            qkv = self.Wqkv(x)
            if self.dwconv and self._one_projection:
                qkv = _convolved(self.dwconv_qkv, qkv)
            q, kv = (
                qkv[..., : self.embed_dim],
                qkv[..., self.embed_dim :],
            )  # split's views could not be rotated in place
        if self.dwconv and not self._one_projection:
            q, kv = _convolved(self.dwconv_q, q), _convolved(self.dwconv_kv, kv)
        return q.unflatten(-1, (self.num_heads, -1)), kv.unflatten(-1, (2, self.num_heads_kv, -1))

    def _attend_to_cache(self, q: Tensor, kv: Tensor, inference: Any) -> Any:
        B, S = q.shape[:2]
        caches = inference.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(
                inference.max_batch_size, inference.max_seqlen, kv.dtype
            )
        first = inference.batch_size_offset
        cache = caches[self.layer_idx][first : first + B]
        lengths = inference.lengths_per_sample
        start = inference.seqlen_offset if lengths is None else lengths[:B]
        if self.rotary_emb_dim > 0:
            q, kv = self.rotary_emb(q, kv, seqlen_offset=start, max_seqlen=inference.max_seqlen)
        inner = self.inner_cross_attn
        return flash_attn_with_kvcache(
            q, cache[:, :, 0], cache[:, :, 1], kv[:, :, 0], kv[:, :, 1], cache_seqlens=start,
            softmax_scale=inner.softmax_scale, causal=inner.causal, window_size=inner.window_size,
            alibi_slopes=inner.alibi_slopes,
        )  # fmt: skip


def _convolved(convolution: Any, x: Tensor) -> Tensor:
    return convolution(x.transpose(1, 2))[..., :-2].transpose(1, 2)
