"""attention of jagged nested tensors: their values are packed sequences already, so they go to attention_varlen without a copy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """out, nested as q [B, j, Hq, D]; with return_lse (out, lse [Hq, total_q]). Reading the longest length waits for the device."""
    from foveate.ops.attention.varlen import attention_varlen

    for name in ("bias", "mask", "kv_lens"):
        if options.pop(name, None) is not None:
            raise ValueError(
                f"{name} does not go with nested tensors, whose lengths are their own; pad them and call attention"
            )
    (qs, cu_q, max_q), (ks, cu_k, max_k), (vs, cu_v, _) = (_packed(n, x) for n, x in (("q", q), ("k", k), ("v", v)))
    if cu_v is not cu_k and not torch.equal(cu_v, cu_k):
        raise ValueError(
            "k and v are nested tensors of different lengths; build v with nested_tensor_from_jagged(values, k.offsets())"
        )
    results = attention_varlen(qs, ks, vs, cu_q, cu_k, max_q, max_k, **options)
    out, *lse = results if isinstance(results, tuple) else (results,)
    out = torch.nested.nested_tensor_from_jagged(out, cu_q)
    return (out, *lse) if lse else out


def _packed(name: str, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Values [total, H, D], offsets [B + 1] and the longest length."""
    if not (isinstance(x, Tensor) and x.is_nested):
        raise ValueError(f"{name} is no nested tensor while another of q, k and v is; all three must be, or none")
    if x.layout is not torch.jagged:
        raise ValueError(
            f"{name} is a nested tensor of layout {x.layout}; convert it with "
            f"torch.nested.nested_tensor(list({name}.unbind()), layout=torch.jagged)"
        )
    jagged: Any = x  # torch's stubs do not know what only nested tensors have
    if x.dim() != 4 or getattr(x, "_ragged_idx", 1) != 1 or jagged.lengths() is not None:
        raise ValueError(
            f"{name} is a nested tensor with {x.dim()} dimensions; it must be [B, lengths, H, D] without holes between the sequences "
            "(foveate.sdpa takes [B, H, lengths, D])"
        )
    offsets = jagged.offsets()
    longest = int(offsets.diff().max()) if len(offsets) > 1 else 0
    return x.values(), offsets, longest
