"""Whether the prompts of now are those of before: their lengths and scripts against a reference, by the population stability index."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

# Beginnings of ranges of code points. What is not a letter of these, such as digits, spaces and signs, belongs to no script.
_RANGES = (
    (0x41, "latin"), (0x5B, ""), (0x61, "latin"), (0x7B, ""), (0xC0, "latin"), (0x2B0, ""), (0x370, "greek"), (0x400, "cyrillic"),
    (0x530, "other"), (0x590, "hebrew"), (0x600, "arabic"), (0x780, "other"), (0x900, "indic"), (0xE00, "other"), (0x1E00, "latin"),
    (0x1F00, "greek"), (0x2000, ""), (0x3040, "kana"), (0x3100, "other"), (0x3400, "han"), (0xA000, "other"), (0xAC00, "hangul"),
    (0xD7B0, ""), (0xF900, "han"), (0xFB00, "other"), (0xFE10, ""), (0x1F000, ""), (0x20000, "han"),
)  # fmt: skip
_STARTS = [start for start, _ in _RANGES]
SCRIPTS = tuple(dict.fromkeys(name for _, name in _RANGES))  # the first is "": none
_LENGTH_BINS = 20  # 0, 1, 2-3, 4-7, ... tokens
_FEWEST = 64  # prompts in the window before an index is given


def script_of(text: str) -> str:
    """That of its first letter, "" without one."""
    for character in text:
        found = _RANGES[max(0, bisect.bisect_right(_STARTS, ord(character)) - 1)][1] if ord(character) >= 0x41 else ""
        if found:
            return found
    return ""


def script_table(tokenizer: Any) -> np.ndarray:
    """The index in SCRIPTS of each token id; a token that is a part of a character counts by the character that its bytes begin."""
    table = np.zeros(tokenizer.vocab_size, np.uint8)
    for token in range(tokenizer.vocab_size):
        try:
            raw = tokenizer.id_to_bytes(token)
        except ValueError:
            continue
        if raw and 0xC2 <= raw[-1] < 0xF4:  # the rest of the character is the next tokens'
            raw += bytes(3 if raw[-1] >= 0xF0 else 2 if raw[-1] >= 0xE0 else 1).replace(b"\0", b"\x80")
        table[token] = SCRIPTS.index(script_of(raw.decode(errors="ignore")))
    return table


def stability_index(reference: Sequence[float] | np.ndarray, current: Sequence[float] | np.ndarray) -> float:
    """sum over bins of (q - p) log(q / p), where p and q are the shares of counts in which each bin has half a count more.

    Below 0.1 little has changed, above 0.25 much.
    """
    p, q = (np.asarray(counts, np.float64) + 0.5 for counts in (reference, current))
    p, q = p / p.sum(), q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


class PromptShift:
    """The first `window` prompts are the reference, unless one is given, as `reference` of a report; the last ones are compared with it."""

    def __init__(self, window: int, reference: dict[str, list[float]] | None = None) -> None:
        self._window = window
        self._lengths = np.zeros(_LENGTH_BINS)  # of the reference
        self._scripts = np.zeros(len(SCRIPTS))
        self._missing = window  # prompts until the reference is whole
        if reference is not None:
            self._lengths, self._scripts, self._missing = *_read(reference), 0
        self._recent: deque[tuple[int, np.ndarray]] = deque(maxlen=window)
        self._table: np.ndarray | None = None

    def read_scripts(self, tokenizer: Any) -> None:
        """Takes a moment for each 100,000 tokens of a vocabulary; before it, scripts are not counted."""
        self._table = script_table(tokenizer)

    def share_scripts(self, other: PromptShift) -> None:
        """Takes the table of another model with the same tokenizer."""
        self._table = other._table

    def add(self, tokens: Sequence[int]) -> None:
        length = min(len(tokens).bit_length(), _LENGTH_BINS - 1)
        scripts = np.zeros(len(SCRIPTS))
        if self._table is not None:
            ids = np.asarray(tokens)
            found = np.bincount(self._table[ids[ids < len(self._table)]], minlength=len(SCRIPTS))[1:]
            scripts[1:] = found / max(1, found.sum())  # a prompt counts as one, however long it is
        if self._missing:
            self._missing -= 1
            self._lengths[length] += 1
            self._scripts += scripts
        else:
            self._recent.append((length, scripts))

    def indices(self) -> tuple[float, float]:
        """How far lengths and scripts have shifted; 0 and 0 while there are too few prompts to say."""
        if self._missing or len(self._recent) < min(_FEWEST, self._window):
            return 0.0, 0.0
        lengths = np.bincount([length for length, _ in self._recent], minlength=_LENGTH_BINS)
        scripts = np.sum([scripts for _, scripts in self._recent], axis=0)
        return stability_index(self._lengths, lengths), stability_index(self._scripts, scripts)

    def reference(self) -> dict[str, list[float]] | None:
        """Counts of prompts by length and by script, to be given to a later server; None while it is being counted."""
        if self._missing:
            return None
        return {"lengths": self._lengths.tolist(), "scripts": [round(value, 6) for value in self._scripts.tolist()]}


def _read(reference: dict[str, list[float]]) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for name, size in (("lengths", _LENGTH_BINS), ("scripts", len(SCRIPTS))):
        counts = reference.get(name)
        good = isinstance(counts, list) and len(counts) == size and all(isinstance(c, (int, float)) for c in counts)
        if not good or not all(math.isfinite(c) and c >= 0 for c in counts or ()):
            raise ValueError(f"the reference needs {name!r}, a list of {size} counts, as /quality gives it")
        found.append(np.asarray(counts, np.float64))
    return found[0], found[1]
