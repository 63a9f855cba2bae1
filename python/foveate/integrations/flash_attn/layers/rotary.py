"""flash_attn.layers.rotary: rotary position embedding with offsets, packed sequences and in place."""

from __future__ import annotations

import torch
from torch import Tensor

import foveate
from foveate.integrations.flash_attn import _packed


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """(a, b) -> (-b, a) of each pair of the last dimension."""
    if interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-b, a), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x [B, S, H, D], tables [S or B, S, rot / 2]: the same by plain torch, differentiable in the tables too."""
    rot = 2 * cos.shape[-1]
    if rot > x.shape[-1]:
        raise ValueError(f"cos rotates {rot} elements of each head; x has head dim {x.shape[-1]}")
    cos, sin = (
        (t.repeat_interleave(2, -1) if interleaved else torch.cat((t, t), -1)).unsqueeze(-2) for t in (cos, sin)
    )
    part = x[..., :rot]
    return torch.cat([part * cos + rotate_half(part, interleaved) * sin, x[..., rot:]], -1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x [B, S, H, D], or packed [total, H, D] with cu_seqlens [B + 1]; cos, sin [positions, rot / 2], rot <= D -> the shape of x.

    Row i of sequence b is rotated by position seqlen_offsets[b] + i. inplace: x is overwritten, also where a gradient is needed (then
    the result is another tensor, since the gradient belongs to what x was). max_seqlen is not needed.
    """
    packed = cu_seqlens is not None
    rows = x[None] if packed else x
    cos, sin = _tables(cos, sin, rows, seqlen_offsets, cu_seqlens)
    out, _ = foveate.apply_rotary(rows, rows[:, :, :1].detach(), cos, sin, interleaved=interleaved)
    out = out[0] if packed else out
    return _written(x, out) if inplace else out


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """q and k of qkv [B, S, 3, H, D], or [B, S, Hq + 2 Hkv, D] with num_heads_q = Hq, rotated in place. Tables: `apply_rotary_emb`.

    cos_k, sin_k: other tables for k (XPos). Where a gradient is needed the result is another tensor.
    """
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ValueError(f"qkv has shape {list(qkv.shape)}; it takes [B, S, 3, heads, head_dim]")
        q, k, v = qkv.unbind(2)
    else:
        if num_heads_q is None or qkv.dim() != 4 or (qkv.shape[2] - num_heads_q) % 2:
            raise ValueError(
                f"qkv has shape {list(qkv.shape)} and num_heads_q={num_heads_q}; it takes [B, S, 3, heads, head_dim], or "
                "[B, S, num_heads_q + 2 * num_heads_k, head_dim] together with num_heads_q"
            )
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split([num_heads_q, heads_k, heads_k], 2)
    tables = _tables(cos, sin, q, seqlen_offsets)
    if cos_k is None or sin_k is None:
        q_out, k_out = foveate.apply_rotary(q, k, *tables, interleaved=interleaved)
    else:
        q_out = apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=seqlen_offsets)
        k_out = apply_rotary_emb(k, cos_k, sin_k, interleaved, seqlen_offsets=seqlen_offsets)
    if not (torch.is_grad_enabled() and qkv.requires_grad):
        q.copy_(q_out), k.copy_(k_out)
        return qkv
    return _written(qkv, torch.stack((q_out, k_out, v), 2) if qkv.dim() == 5 else torch.cat((q_out, k_out, v), 2))


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """k of kv [B, S, 2, H, D] rotated in place; where a gradient is needed the result is another tensor."""
    k, v = kv.unbind(2)
    k_out = apply_rotary_emb(k, cos, sin, interleaved, seqlen_offsets=seqlen_offsets)
    if not (torch.is_grad_enabled() and kv.requires_grad):
        k.copy_(k_out)
        return kv
    return _written(kv, torch.stack((k_out, v), 2))


def _written(x: Tensor, out: Tensor) -> Tensor:
    """x overwritten by out. With a gradient out itself is the result; the write raises x's version, so that no one uses it unawares."""
    x.detach().copy_(out.detach())
    return out if out.requires_grad else x


def _tables(
    cos: Tensor, sin: Tensor, rows: Tensor, offsets: int | Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin for the rows [B, S, ...]: [S, rot / 2] or [B, S, rot / 2], in a dtype that `foveate.apply_rotary` takes."""
    S = rows.shape[1]
    if cos.dtype not in (rows.dtype, torch.float32):
        cos, sin = cos.to(rows.dtype), sin.to(rows.dtype)
    if cu_seqlens is not None:
        places = _packed.positions_of(cu_seqlens, S)
        if isinstance(offsets, Tensor):
            offsets = offsets.long()[_packed.sequence_of(cu_seqlens, S)]
        return cos[places + offsets], sin[places + offsets]
    if isinstance(offsets, Tensor):
        places = offsets.long()[:, None] + torch.arange(S, device=offsets.device)
        return cos[places], sin[places]
    if offsets < 0 or offsets + S > cos.shape[0]:
        raise ValueError(
            f"cos and sin have {cos.shape[0]} positions; {S} rows from offset {offsets} need {offsets + S}"
        )
    return cos[offsets : offsets + S], sin[offsets : offsets + S]


class RotaryEmbedding(torch.nn.Module):
    """Tables for the first `dim` elements of each head, theta_c = base ** (-2 c / dim), applied in place; XPos with scale_base.

    RoFormer, Su et al. 2021, arXiv 2104.09864; XPos, Sun et al. 2022, arXiv 2212.10554.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        self.register_buffer("inv_freq", self.base ** (-even / dim), persistent=False)
        self.register_buffer(
            "scale", None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim), persistent=False
        )
        self._cached: tuple[Tensor, ...] = ()  # cos, sin of q, and of k where they differ

    def _update_cos_sin_cache(self, seqlen: int, device: torch.device, dtype: torch.dtype) -> None:
        old = self._cached
        fits = old and old[0].shape[0] >= seqlen and old[0].device == device and old[0].dtype is dtype
        if fits and not (self.training and old[0].is_inference()):
            return
        place = torch.arange(seqlen, device=device, dtype=torch.float32)
        even = torch.arange(
            0, self.dim, 2, device=device, dtype=torch.float32
        )  # in fp32, whatever the module was cast to
        angles = torch.outer(place, self.base ** (-even / self.dim))
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None or self.scale_base is None:
            self._cached = (cos.to(dtype), sin.to(dtype))
            return
        grow = self.scale.to(device).float() ** ((place - seqlen // 2) / self.scale_base)[:, None]
        self._cached = tuple(t.to(dtype) for t in (cos * grow, sin * grow, cos / grow, sin / grow))

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """qkv as `apply_rotary_emb_qkv_` takes it; or q [B, S, H, D] with kv [B, S, 2, H, D]. Returns qkv, or (q, kv).

        A tensor as seqlen_offset needs max_seqlen, up to which the tables reach.
        """
        if max_seqlen is None:
            if isinstance(seqlen_offset, Tensor):
                raise ValueError(
                    "seqlen_offset is a tensor: pass max_seqlen, up to which the tables of cos and sin reach"
                )
            max_seqlen = qkv.shape[1] + seqlen_offset
        self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        cos, sin, cos_k, sin_k = (*self._cached[:2], *self._cached[-2:])
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv,
                cos,
                sin,
                None if self.scale is None else cos_k,
                None if self.scale is None else sin_k,
                self.interleaved,
                seqlen_offset,
                num_heads_q,
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
