"""The causal mask as a tensor that is not stored until someone looks into it.

transformers' sdpa mask function answers None both for "plain causal" and for "no mask", and leaves it to each attention module to say
by `is_causal` which one was meant. Many modules say nothing or the wrong thing. Here the causal mask stays a mask, so that None
means what it means in eager attention: every key is visible.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from foveate.ops.torch_internals import no_torch_function


class _Content:
    """What aliases of one mask share: the offset, and the stored mask once an operation has asked for it."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.stored: Tensor | None = None


class CausalMask(Tensor):
    """[B, 1, Sq, Skv], where query i sees key j <= i + offset. The stored mask takes its place in every operation.

    bool with True = keep, or of a floating dtype, which is added: 0 where it sees and the most negative number where not.

    Once an operation has read it the stored mask is all that counts: a view of it may have been written to.
    """

    content: _Content

    @staticmethod
    def __new__(
        cls, batch: int, Sq: int, Skv: int, offset: int, device: torch.device | str, dtype: torch.dtype = torch.bool
    ) -> CausalMask:
        return cls._over((batch, 1, Sq, Skv), _Content(offset), torch.device(device), dtype)

    @classmethod
    def _over(cls, shape: Any, content: _Content, device: torch.device, dtype: torch.dtype) -> CausalMask:
        mask: CausalMask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        mask.content = content
        return mask

    __torch_function__ = no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _SAME and isinstance(args[0], CausalMask):
            return cls._over(args[0].shape, args[0].content, args[0].device, args[0].dtype)
        args, kwargs = tree_map(_stored, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"CausalMask({list(self.shape)}, offset={self.content.offset})"

    @property
    def offset(self) -> int | None:
        """Query i sees keys 0 to i + offset; None if the stored mask decides."""
        return self.content.offset if self.content.stored is None else None


_SAME = frozenset((torch.ops.aten.alias.default, torch.ops.aten.detach.default))


def _stored(x: Any) -> Any:
    if not isinstance(x, CausalMask):
        return x
    content, (B, _, Sq, Skv) = x.content, x.shape
    if content.stored is None:
        rows, keys = (torch.arange(n, device=x.device) for n in (Sq, Skv))
        seen = (keys <= rows[:, None] + content.offset).expand(B, 1, Sq, Skv)
        if x.dtype is torch.bool:
            content.stored = seen.contiguous()
        else:
            hidden = torch.finfo(x.dtype).min
            content.stored = torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill_(~seen, hidden)
    return content.stored


def stored(mask: Tensor) -> Tensor:
    """`mask` as a plain tensor."""
    return _stored(mask)
