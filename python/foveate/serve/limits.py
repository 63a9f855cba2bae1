"""What shares a server between keys: how much each may use in a minute, and whose turn is next."""

from __future__ import annotations

import time
from collections.abc import Callable


class Bucket:
    """Up to per_minute at once, and per_minute in each minute after that. clock: seconds."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._at = float(per_minute), clock()

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now

    def take(self, amount: float) -> float:
        """0 and the amount is taken; or the seconds after which it will be there."""
        self._fill()
        if amount <= self._level:
            self._level -= amount
            return 0.0
        return (amount - self._level) * 60 / self.per_minute

    def give(self, amount: float) -> None:
        """Back; a negative amount may leave less than nothing, which the next minutes pay."""
        self._fill()
        self._level = min(self.per_minute, self._level + amount)


class Turns:
    """Start-time fair queueing (Goyal et al. 1996): each key's requests get tags that lie as far apart as they cost, from the tag of
    what has begun last. In the order of the tags, a key that sends many does not delay one that sends few."""

    def __init__(self) -> None:
        self._now = 0.0
        self._ends: dict[str, float] = {}

    def tag(self, key: str, cost: float) -> float:
        """The place of a new request among those that wait; requests of one key keep their order."""
        start = max(self._now, self._ends.get(key, 0.0))
        self._ends = {name: end for name, end in self._ends.items() if end > self._now}
        self._ends[key] = start + cost
        return start

    def began(self, tag: float) -> None:
        self._now = max(self._now, tag)
