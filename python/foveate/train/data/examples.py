"""The sequences that data give to learn from, which of them are left out and why, and errors that name their row."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from foveate.files.data_files import CONTINUES
from foveate.train.config import TrainConfig

Columns = dict[str, list[np.ndarray]]


class Examples(NamedTuple):
    """Every sequence that a store gives: its document, its first token in it, and how many tokens the model reads; int64 each."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Example(NamedTuple):
    document: int
    start: int
    length: int
    rng_key: tuple[int, int]  # (epoch, number of the example): masks are drawn from it and the run's seed


class Parts(NamedTuple):
    """For each document of a store, what data to evaluate on are taken by."""

    groups: np.ndarray  # int64; documents of one group, such as the replies of one chat, stay together
    classes: np.ndarray  # int64; each class is held out by the same share
    divisible: np.ndarray  # bool; whether some of its examples may be held out without the others


def text_of(row: dict[str, Any], field: str, cure: str = ": set text_field, or rename the field") -> str:
    """ValueError for a row without it."""
    if isinstance(row.get(field), str):
        return row[field]
    names = ", ".join(repr(name) for name in row if name != CONTINUES) or "none"
    found = f", but a {type(row[field]).__name__}" if field in row else ""
    raise ValueError(f"there is no text in {field!r}{found}; the fields are {names}{cure}")


def too_long(config: TrainConfig, lengths: np.ndarray, longest: int, what: str) -> np.ndarray:
    """Which of the `lengths` are more than `longest`; ValueError if there are any and config.too_long is "error"."""
    found = lengths > longest
    if found.any() and config.too_long == "error":
        raise ValueError(
            f"{int(found.sum())} of {len(found)} {what} are longer than max_length={longest} tokens, the longest has "
            f"{int(lengths.max())}; raise max_length, leave them out with too_long='drop', or cut them with too_long='truncate'"
        )
    return found


def length_notes(config: TrainConfig, lengths: np.ndarray, longest: int, what: str) -> list[str]:
    found = int((lengths > longest).sum())
    if not found:
        return []
    done = "are cut at its end" if config.too_long == "truncate" else "are left out"
    return [
        f"{found} of {len(lengths)} {what} are longer than max_length={longest} tokens, the longest {int(lengths.max())}, and {done}"
    ]


def empty_notes(empty: np.ndarray) -> list[str]:
    count = int(empty.sum())
    return [f"{count} of {len(empty)} texts have too few tokens to learn from and are left out"] if count else []


def at_row(row: dict[str, Any], error: Exception) -> ValueError:
    return ValueError(f"{getattr(row, 'place', 'a row')}: {error}")
