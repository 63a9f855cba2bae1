"""Which examples each step reads: packing into rows, the order of the rows, and the share of each process. Nothing else is state."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Examples into rows of at most `capacity` tokens: longest first, each into the fullest row that has room for it.

    Best-fit decreasing needs at most 11/9 of the fewest rows, plus one (Johnson 1973); no example is cut. Lengths are in [1,
    capacity]. O(n log n) but for shifting the list of the rows that are not full.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example_id in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example_id])
        place = bisect_left(room, (length, -1))
        if place == len(room):
            free, row = capacity, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(example_id)
        if free > length:
            insort(room, (free - length, row))
    return rows


class ExampleIndex(NamedTuple):
    """One example of an epoch, which is part of what its masks are drawn from."""

    example_id: int
    epoch: int


class BatchPlan:
    """The packed rows of every step, a function of the seed and the step alone; so a run goes on anywhere without reading from the start.

    lengths: tokens of each example. A row holds one example, or with packing several that fit into `capacity` tokens.
    """

    def __init__(self, lengths: np.ndarray, capacity: int, *, packing: bool, seed: int, shuffle: bool = True) -> None:
        if len(lengths) == 0:
            raise ValueError("the data set is empty: no row gives an example to train on")
        self.lengths = lengths
        self.rows = best_fit(lengths, capacity) if packing else [[example_id] for example_id in range(len(lengths))]
        self._seed, self._shuffle = seed, shuffle
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self.rows)

    def packed_row(self, number: int) -> list[ExampleIndex]:
        """Row `number` of an endless series of epochs, each in an order of its own."""
        epoch, place = divmod(number, len(self.rows))
        if self._order[0] != epoch:
            order = np.arange(len(self.rows))
            if self._shuffle:
                order = np.random.default_rng([self._seed, epoch]).permutation(order)
            self._order = (epoch, order)
        return [ExampleIndex(example_id, epoch) for example_id in self.rows[self._order[1][place]]]

    def step(self, step: int, rows: int, rank: int = 0, world_size: int = 1) -> list[list[ExampleIndex]]:
        """The `rows` rows of one process in optimizer step `step`. All processes together read the next rows * world_size."""
        first = step * rows * world_size
        return [self.packed_row(first + rank + i * world_size) for i in range(rows)]
