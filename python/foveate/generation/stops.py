"""Where the text of a sample ends: stop strings, which may span tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches a growing text for the first of the stop strings.

    Hidden pieces, which are special tokens, are searched and are no part of `text`.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._longest = max(map(len, self._stops), default=0)
        self._all = ""  # with the hidden pieces
        self._hidden: list[tuple[int, int]] = []  # where they stand in it
        self._visible = ""  # without them
        self.found: str | None = None
        self._from = 0  # nothing before is searched

    @property
    def text(self) -> str:
        return self._visible

    def push(self, piece: str, search: bool = True, hidden: bool = False) -> bool:
        """Adds text; True if a stop string is complete, and then `text` ends before it, or after it with `include`.

        search=False: what is added now never counts as part of a stop string (min_tokens).
        """
        if hidden and piece:
            self._hidden.append((len(self._all), len(self._all) + len(piece)))
        else:
            self._visible += piece
        self._all += piece
        if not search:
            self._from = len(self._all)
            return False
        if not piece or not self._stops:
            return False
        start = max(self._from, len(self._all) - len(piece) - self._longest + 1)
        hits = [(at, i) for i, stop in enumerate(self._stops) if (at := self._all.find(stop, start)) >= 0]
        if not hits:
            return False
        at, i = min(hits)
        self.found = self._stops[i]
        end = at + len(self.found) if self._include else at
        # included is the whole stop string, also what of it is a special token
        self._hidden = [(a, min(b, at)) for a, b in self._hidden if a < at]
        self._all = self._all[:end]
        self._visible = self._shown()
        return True

    @property
    def safe(self) -> int:
        """Length of the text that no later text can take back: its end may be the beginning of a stop string."""
        if self.found is not None:
            return len(self.text)
        tail = self._all[max(self._from, len(self._all) - self._longest + 1) :]
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(tail)), longest, -1):
                if tail.endswith(stop[:size]):
                    longest = size
                    break
        end, hidden = len(self._all) - longest, 0
        for first, last in reversed(self._hidden):
            if last <= end:
                break
            hidden += last - max(first, end)
        return len(self._visible) - (longest - hidden)

    def _shown(self) -> str:
        shown, at = "", 0
        for first, last in self._hidden:
            shown += self._all[at:first]
            at = last
        return shown + self._all[at:]
