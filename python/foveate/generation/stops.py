"""Where the text of a sample ends: stop strings, which may span tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches a growing text for the first of the stop strings."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._longest = max(map(len, self._stops), default=0)
        self.text = ""
        self.found: str | None = None
        self._from = 0  # nothing before is searched

    def push(self, piece: str, search: bool = True) -> bool:
        """Adds text; True if a stop string is complete, and then `text` ends before it, or after it with `include`.

        search=False: what is added now never counts as part of a stop string (min_tokens).
        """
        self.text += piece
        if not search:
            self._from = len(self.text)
            return False
        if not piece or not self._stops:
            return False
        start = max(self._from, len(self.text) - len(piece) - self._longest + 1)
        hits = [(at, i) for i, stop in enumerate(self._stops) if (at := self.text.find(stop, start)) >= 0]
        if not hits:
            return False
        at, i = min(hits)
        self.found = self._stops[i]
        self.text = self.text[: at + len(self.found) if self._include else at]
        return True

    @property
    def safe(self) -> int:
        """Length of the text that no later text can take back: its end may be the beginning of a stop string."""
        if self.found is not None:
            return len(self.text)
        tail = self.text[max(self._from, len(self.text) - self._longest + 1) :]
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(tail)), longest, -1):
                if tail.endswith(stop[:size]):
                    longest = size
                    break
        return len(self.text) - longest
