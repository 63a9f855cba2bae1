"""Which tokens of a sequence each rank holds: splitting, putting together, positions, and what parts see of each other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

LAYOUTS = ("zigzag", "contiguous")


class Span(NamedTuple):
    """Tokens that are consecutive both in the whole sequence and in what a rank holds."""

    position: int  # of the first one in the whole sequence
    start: int  # its place in the rank's tensor
    length: int


def check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")


def spans(rank: int, size: int, length: int, layout: str) -> list[Span]:
    """What `rank` of `size` holds when each rank holds `length` tokens. zigzag: chunks rank and 2 * size - 1 - rank of 2 * size."""
    if layout == "contiguous":
        return [Span(rank * length, 0, length)]
    if length % 2:
        raise ValueError(
            f"a rank holds {length} tokens; the zigzag layout needs an even number, two chunks of one size"
        )
    half = length // 2
    return [Span(rank * half, 0, half), Span((2 * size - 1 - rank) * half, half, half)]


def by_sequence(held: list[Span], cu_seqlens: Sequence[int] | None) -> list[tuple[int, Span]]:
    """The spans, cut where packed sequences end, each with the number of its sequence. None: one sequence, number 0."""
    if cu_seqlens is None:
        return [(0, span) for span in held]
    spans = []
    for span in held:
        at, end = span.position, span.position + span.length
        number = bisect_right(cu_seqlens, at) - 1
        while at < end:
            stop = min(end, cu_seqlens[number + 1])
            if stop > at:
                spans.append((number, Span(at, span.start + at - span.position, stop - at)))
            at, number = stop, number + 1
    return spans


class Block(NamedTuple):
    """Some rows and keys of what a rank holds, consecutive in the whole sequence, and the window between them, for one call."""

    rows: slice
    keys: slice
    window: tuple[int, int]


def block(rows: Span, keys: Span, offset: int, left: int, right: int) -> Block | None:
    """The part of rows x keys within the window, None if it is empty. offset: Skv - Sq of the whole sequence, as causal is
    bottom-right.

    `attention` aligns the last row with the last key. Here the last key is `shift` positions after the last row, so each side of the
    window moves by as much. Where it would become negative, which `attention` cannot say, the rows or keys at that end see nothing of
    the other and are cut off; then it is 0.
    """
    row, key = rows.position + offset, keys.position
    row_end, key_end = row + rows.length, key + keys.length
    if right >= 0:
        key_end = min(key_end, row_end + right)
    if left >= 0:
        row_end = min(row_end, key_end + left)
        key = max(key, row - left)
    if right >= 0:
        row = max(row, key - right)
    if row >= row_end or key >= key_end:
        return None
    shift = key_end - row_end
    left = left + shift if left >= 0 else -1
    right = right - shift if right >= 0 else -1
    # distances run from 1 - (number of keys) to (number of rows) - 1; a side that cuts off none of them is unlimited
    window = (left if left < key_end - key - 1 else -1, right if right < row_end - row - 1 else -1)
    row_at, key_at = rows.start - rows.position - offset, keys.start - keys.position
    return Block(slice(row + row_at, row_end + row_at), slice(key + key_at, key_end + key_at), window)


def sequence_multiple(group: dist.ProcessGroup | None = None, layout: str = "zigzag") -> int:
    """The length of a sequence must be a multiple of this to be split over the group."""
    check_layout(layout)
    return dist.get_world_size(group) * (2 if layout == "zigzag" else 1)


def sequence_positions(
    total: int,
    *,
    group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    device: torch.device | str | None = None,
) -> Tensor:
    """int64 [total / ranks]: the positions, in a sequence of `total` tokens, of those that this rank holds."""
    length = _share(total, group, layout)
    held = spans(dist.get_rank(group), dist.get_world_size(group), length, layout)
    return torch.cat([torch.arange(s.position, s.position + s.length, device=device) for s in held])


def split_sequence(
    x: Tensor, *, dim: int = 1, group: dist.ProcessGroup | None = None, layout: str = "zigzag"
) -> Tensor:
    """This rank's tokens of x, the whole sequence along `dim`: a copy, differentiable. Nothing is sent.

    ValueError for a length that the group's 2n chunks (contiguous: n) do not divide. A causal sequence may be padded at its end: no token
    before sees the padding, and with labels of -100 there it does not count.
    """
    _share(x.shape[dim], group, layout)
    return x.index_select(dim, sequence_positions(x.shape[dim], group=group, layout=layout, device=x.device))


@torch.no_grad()
def gather_sequence(
    x: Tensor, *, dim: int = 1, group: dist.ProcessGroup | None = None, layout: str = "zigzag"
) -> Tensor:
    """The whole sequence from each rank's part x, on every rank: the inverse of `split_sequence`. Without gradient."""
    check_layout(layout)
    size, length = dist.get_world_size(group), x.shape[dim]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, x.contiguous(), group=group)
    pieces = [(s.position, part.narrow(dim, s.start, s.length))
              for rank, part in enumerate(parts) for s in spans(rank, size, length, layout)]  # fmt: skip
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda pair: pair[0])], dim)


def _share(total: int, group: dist.ProcessGroup | None, layout: str) -> int:
    multiple = sequence_multiple(group, layout)
    if total % multiple:
        raise ValueError(
            f"{total} tokens cannot be split over {dist.get_world_size(group)} ranks in the {layout} layout, which needs a multiple of "
            f"{multiple}; pad a causal sequence at its end to {-(-total // multiple) * multiple}, with labels of -100"
        )
    return total // dist.get_world_size(group)
