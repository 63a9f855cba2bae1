"""Words and n-grams of words as 64-bit numbers, the same in every process and run, computed with numpy."""

from __future__ import annotations

import hashlib
import re

import numpy as np

# A letter of a script without spaces between words is a word by itself; else letters, digits and marks that follow one another.
_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+"
)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MOST_WORDS = 2**20  # in the cache of a process


def words(text: str) -> list[str]:
    """In small letters, without punctuation: what n-grams are made of."""
    return _WORD.findall(text.lower())


class WordHashes:
    """64 bits of each word, by BLAKE2b, remembered."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, words: list[str]) -> np.ndarray:
        """uint64 [words]"""
        known = self._known
        if len(known) > _MOST_WORDS:
            known.clear()
        for word in set(words).difference(known):
            known[word] = int.from_bytes(
                hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little"
            )
        return np.fromiter(map(known.__getitem__, words), np.uint64, len(words))


def mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: each bit of a result depends on all bits of its value."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """uint64 [max(0, words - n + 1)]: a number for each n words that follow one another, which depends on their order."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for i in range(n):
        total = total * _MULTIPLIER + hashes[i : i + count]
    return mixed(total)


def shingles(hashes: np.ndarray, n: int) -> np.ndarray:
    """The n-grams of a document; of one that has fewer than n words, all its words as one; none of an empty one."""
    if not len(hashes):
        return np.zeros(0, np.uint64)
    return ngrams(hashes, min(n, len(hashes)))


class MinHash:
    """Signatures of sets of 64-bit numbers: the share of equal places in two signatures estimates the Jaccard similarity of the sets.

    A signature is uint32 [permutations]: the least value of each of so many random functions (a x + b) mod 2^64, its upper 32 bits.
    Broder 1997, "On the resemblance and containment of documents".
    """

    EMPTY = np.uint32(0xFFFFFFFF)

    def __init__(self, permutations: int, seed: int) -> None:
        rng = np.random.Generator(np.random.Philox(seed))
        top = np.iinfo(np.uint64).max
        self._factors = rng.integers(0, top, permutations, np.uint64, endpoint=True) | np.uint64(1)
        self._offsets = rng.integers(0, top, permutations, np.uint64, endpoint=True)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        least = np.full(len(self._factors), self.EMPTY, np.uint32)
        for start in range(0, len(values), 256):  # a block stays in the cache
            block = np.multiply.outer(self._factors, values[start : start + 256])
            block += self._offsets[:, None]
            np.minimum(least, (block.min(axis=1) >> np.uint64(32)).astype(np.uint32), out=least)
        return least


def bands_and_rows(threshold: float, permutations: int) -> tuple[int, int]:
    """How LSH divides a signature: the (bands, rows) with the least area of false positives and false negatives about the threshold.

    Two documents of similarity s meet in a band with probability 1 - (1 - s^rows)^bands. Leskovec, Rajaraman, Ullman, "Mining of Massive
    Datasets", section 3.4.
    """
    grid = np.linspace(0, 1, 201)[1:]
    best, chosen = np.inf, (1, permutations)
    for rows in range(1, permutations + 1):
        bands = permutations // rows
        meets = 1 - (1 - grid**rows) ** bands
        area = float(meets[grid < threshold].sum() + (1 - meets)[grid >= threshold].sum()) / len(grid)
        if area < best:
            best, chosen = area, (bands, rows)
    return chosen
