"""Operands that FlashAttention-3 has and version 2 has not: float8 with factors, qv, chunks."""

from __future__ import annotations

import torch
from torch import Tensor

Result = Tensor | tuple[Tensor, Tensor]  # out, or (out, lse)
Descales = tuple[Tensor | None, Tensor | None, Tensor | None]  # of q, k and v, [B, Hkv] each

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def descaled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qv: Tensor | None,
    descales: Descales,
    of_q: Tensor | None = None,
    of_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The four with their factors [B, Hkv] multiplied in fp32; of_q, of_k: the sequence of each packed row."""
    Hkv = k.shape[-2]

    def one(x: Tensor, descale: Tensor | None, sequence: Tensor | None) -> Tensor:
        dtype = torch.bfloat16 if x.dtype in FLOAT8 else x.dtype
        if descale is None:
            return x.to(dtype)
        factor = descale.repeat_interleave(x.shape[-2] // Hkv, 1)[..., None]
        factor = factor[:, None] if sequence is None else factor[sequence]
        return (x.float() * factor).to(dtype)

    of_qv = None if qv is None else one(qv, descales[0], of_q)
    return one(q, descales[0], of_q), one(k, descales[1], of_k), one(v, descales[2], of_k), of_qv


def with_qv(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None) -> tuple[Tensor, Tensor]:
    """q.k + qv.v is one product of longer heads, whose default scale is FlashAttention-3's."""
    return (q, k) if qv is None else (torch.cat((q, qv.to(q.dtype)), -1), torch.cat((k, v), -1))


def chunks(chunk: int, Sq: int, Sk: int, kv_lens: Tensor | None, device: torch.device) -> Tensor | None:
    """bool [Sq, Sk], or [B, 1, Sq, Sk] with kv_lens: the key is in the query's chunk. None without chunks."""
    if chunk <= 0:
        return None
    last = torch.tensor([Sk], device=device) if kv_lens is None else kv_lens.long()
    query = torch.arange(Sq, device=device)[:, None] + (last[:, None, None, None] - Sq)
    key = torch.arange(Sk, device=device)
    return torch.div(query, chunk, rounding_mode="floor") == key // chunk
