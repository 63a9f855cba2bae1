"""Zeros in which the blocks of a kernel count themselves: the last of a group to finish does what is left, and puts the zero back.

Calls that may run at the same time must not share them. Those of one stream never do; a captured CUDA graph, which may be replayed on
any stream, keeps for itself what it takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FOR_GRAPHS = (
    1 << 16
)  # of a device; a capture that finds none left sets its counters to zero in the graph, which is slower

_of_stream: dict[tuple[int | None, int], Tensor] = {}
_for_graphs: dict[int | None, Tensor] = {}  # what no graph has taken yet


def counters(device: torch.device, n: int) -> Tensor:
    """int32 [>= n], zeros. The kernel leaves zeros behind."""
    if device.type != "cuda":
        return torch.zeros(n, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _of_graph(device, n)
    # Made before the first capture, in which memory cannot be set but by the graph itself.
    if device.index not in _for_graphs:
        _for_graphs[device.index] = torch.zeros(_FOR_GRAPHS, dtype=torch.int32, device=device)
    key = device.index, torch.cuda.current_stream(device).cuda_stream
    mine = _of_stream.get(key)
    if mine is None or len(mine) < n:
        mine = _of_stream[key] = torch.zeros(max(n, 1024), dtype=torch.int32, device=device)
    return mine


def _of_graph(device: torch.device, n: int) -> Tensor:
    left = _for_graphs.get(device.index)
    if left is None or len(left) < n:
        return torch.zeros(n, dtype=torch.int32, device=device)
    _for_graphs[device.index] = left[n:]
    return left[:n]
