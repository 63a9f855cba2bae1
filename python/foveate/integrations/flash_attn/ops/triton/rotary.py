"""flash_attn.ops.triton.rotary, on every device."""

from __future__ import annotations

from torch import Tensor

from foveate.integrations.flash_attn.layers.rotary import apply_rotary_emb


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """`flash_attn.layers.rotary.apply_rotary_emb`; conjugate turns back, by the negative angles."""
    sin = -sin if conjugate else sin
    return apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)
