"""What rules look at in a document, each computed once and when it is first asked for."""

from __future__ import annotations

import functools
import re

import numpy as np

from foveate.data.shingles import ngrams

_WORD = re.compile(r"\w+(?:['’\u2010-]\w+)*")
_PARAGRAPHS = re.compile(r"\n[ \t]*\n\s*")


class Features:
    """words: runs of letters, digits, apostrophes and hyphens within. tokens: parted by white space. lines: not empty ones."""

    def __init__(self, text: str) -> None:
        self.text = text

    @functools.cached_property
    def words(self) -> list[str]:
        return _WORD.findall(self.text)

    @functools.cached_property
    def tokens(self) -> list[str]:
        return self.text.split()

    @functools.cached_property
    def lines(self) -> list[str]:
        return [line for line in self.text.split("\n") if line and not line.isspace()]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        return [part for part in _PARAGRAPHS.split(self.text.strip()) if part]

    @functools.cached_property
    def word_lengths(self) -> np.ndarray:
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @functools.cached_property
    def word_ids(self) -> np.ndarray:
        """uint64; equal words have equal numbers, within this document."""
        known: dict[str, int] = {}
        ids = [known.setdefault(word, len(known) + 1) for word in self.words]
        return np.array(ids, np.uint64) * np.uint64(0xD6E8FEB86659FD93)

    def duplicates(self, parts: list[str]) -> tuple[float, float]:
        """The fractions that repeated lines or paragraphs have, by number and by characters."""
        seen: set[str] = set()
        again = characters = total = 0
        for part in parts:
            total += len(part)
            if part in seen:
                again += 1
                characters += len(part)
            seen.add(part)
        return again / max(1, len(parts)), characters / max(1, total)

    @functools.cached_property
    def _longest_repeat(self) -> int:
        """The most words, up to 10, that follow one another twice: longer n-grams need not be counted."""
        for n in range(2, 11):
            grams = np.sort(ngrams(self.word_ids, n))
            if not (grams[1:] == grams[:-1]).any():
                return n - 1
        return 10

    def top_ngram(self, n: int) -> float:
        """The share of the words' characters in the most frequent n-gram, the longest of those that are equally frequent; 0 if none
        comes twice."""
        if n > self._longest_repeat:
            return 0.0
        _, first, counts = np.unique(ngrams(self.word_ids, n), return_index=True, return_counts=True)
        most = int(counts.max())
        sums = np.concatenate([[0], np.cumsum(self.word_lengths)])
        starts = first[counts == most]
        return float((sums[starts + n] - sums[starts]).max() * most / max(1, sums[-1]))

    def duplicate_ngrams(self, n: int) -> float:
        """The share of the words' characters within n-grams that come more than once, each character counted once."""
        if n > self._longest_repeat:
            return 0.0
        grams = ngrams(self.word_ids, n)
        _, inverse, counts = np.unique(grams, return_inverse=True, return_counts=True)
        twice = counts[inverse] > 1
        edges = np.zeros(len(self.words) + 1, np.int64)
        edges[: len(grams)] += twice
        edges[n : n + len(grams)] -= twice
        covered = np.cumsum(edges[:-1]) > 0
        return float(self.word_lengths[covered].sum() / max(1, self.word_lengths.sum()))
