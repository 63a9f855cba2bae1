"""Drafts from the text itself: what followed the last occurrence of the same few tokens (prompt lookup, Saxena 2023)."""

from __future__ import annotations


class PromptLookup:
    """Remembers where each run of `sizes` tokens last ended, so that a draft costs the same however long the text is."""

    def __init__(self, sizes: tuple[int, ...] = (3, 2)) -> None:
        self._sizes = sizes  # the longest first
        self._ends: dict[tuple[int, ...], int] = {}
        self._seen = 0  # tokens[:seen] are in the index, but for runs that end with the last of them

    def draft(self, tokens: list[int], k: int) -> list[int]:
        """k tokens that may follow `tokens`, which has only grown since the last call; [] without a repetition.

        What followed goes on over its end into the draft itself, as copies in LZ77 do: a a a drafts a a a a.
        """
        for end in range(self._seen, len(tokens)):  # the run that ends at the last token has no continuation yet
            for size in self._sizes:
                if end >= size:
                    self._ends[tuple(tokens[end - size : end])] = end
        self._seen = max(self._seen, len(tokens))
        for size in self._sizes:
            last = self._ends.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if last is not None:
                return [tokens[last + i % (len(tokens) - last)] for i in range(k)]
        return []
