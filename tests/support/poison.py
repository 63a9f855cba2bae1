"""Ways to make a read or write of the wrong memory visible."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_BAND = 64  # elements before and after each output; keeps 64-byte alignment for every dtype
_CANARY = {True: float("nan"), False: 77}


def nan_beyond(x: Tensor, kv_lens: Tensor) -> Tensor:
    """A copy of x [B, S, ...] with NaN from position kv_lens[b] on."""
    x = x.detach().clone()
    for b, length in enumerate(kv_lens.tolist()):
        x[b, length:] = float("nan")
    return x


def nan_padded(x: Tensor) -> Tensor:
    """The same values as a view into a larger tensor of NaN, with one more row and head and 8 more elements."""
    extra = [1] * (x.dim() - 1) + [8]
    big = torch.full([n + e for n, e in zip(x.shape, extra)], float("nan"), dtype=x.dtype, device=x.device)
    view = big[tuple(slice(n) for n in x.shape)]
    view.copy_(x.detach())
    return view


class OutputGuard:
    """The tensors that were allocated while `guarded_outputs` was active."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def allocate(self, size, dtype: torch.dtype, device) -> Tensor:
        # The real functions, since torch.empty is replaced at this time.
        value = _CANARY[dtype.is_floating_point]
        count = torch.Size(size).numel()
        buffer = torch.full((count + 2 * _BAND,), value, dtype=dtype, device=device)
        self.buffers.append((buffer, buffer.clone()))
        return buffer[_BAND : _BAND + count].view(size)

    def check(self) -> None:
        for buffer, before in self.buffers:
            for band in (slice(0, _BAND), slice(buffer.numel() - _BAND, None)):
                intact = torch.equal(buffer[band].view(torch.uint8), before[band].view(torch.uint8))
                assert intact, f"a write outside an output of {buffer.numel() - 2 * _BAND} elements of {buffer.dtype}"


@contextlib.contextmanager
def guarded_outputs() -> Iterator[OutputGuard]:
    """Fills what torch.empty and its relatives return with NaN and surrounds it with canaries, checked at the end.

    So an element that a kernel forgets to write stays NaN, and one that it writes outside is found.
    """
    guard = OutputGuard()
    saved = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def sized(size: tuple) -> tuple:
        return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size

    def empty(*size, dtype=None, device=None, **other):
        if other:
            return saved[0](*size, dtype=dtype, device=device, **other)
        return guard.allocate(sized(size), dtype or torch.get_default_dtype(), device)

    def empty_like(x, *, dtype=None, device=None, **other):
        if other or not x.is_contiguous():
            return saved[1](x, dtype=dtype, device=device, **other)
        return guard.allocate(tuple(x.shape), dtype or x.dtype, device or x.device)

    def new_empty(x, *size, dtype=None, device=None, **other):
        if other:
            return saved[2](x, *size, dtype=dtype, device=device, **other)
        return guard.allocate(sized(size), dtype or x.dtype, device or x.device)

    torch.empty, torch.empty_like, torch.Tensor.new_empty = empty, empty_like, new_empty
    try:
        yield guard
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = saved
    guard.check()
