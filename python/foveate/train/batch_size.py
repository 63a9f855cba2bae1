"""How many rows a step reads where nobody says it: as many as leave steps enough to learn."""

from __future__ import annotations

import math

import numpy as np

from foveate.train.data.plan import best_fit

ROWS = 8  # of a forward pass, where the data are many
STEPS = 20  # of a pass over the data: with fewer, the warm-up and the schedule mean nothing
SEQUENCES = 4  # of a step, at least: a gradient of fewer says little


def choose(lengths: np.ndarray, max_length: int, *, packing: bool, spread: int) -> tuple[int, int]:
    """batch_size, and the tokens that a packed row has room for, at most max_length.

    lengths: of the sequences of a pass. spread: over how many passes and processes a step's rows are divided. Data that fill more
    than 20 steps of 8 rows have those. Of fewer, a step reads fewer rows; of less than 20 rows, it reads one with room for fewer
    tokens, 4 sequences or more.
    """
    rows = len(best_fit(lengths, max_length)) if packing else len(lengths)
    if rows >= STEPS * ROWS * spread:
        return ROWS, max_length
    if not packing:  # a row is a sequence
        return max(1, min(ROWS, rows // spread)), max_length
    if rows >= STEPS * spread:
        return max(1, min(ROWS, rows // (STEPS * spread))), max_length
    steps = max(1, min(STEPS, len(lengths) // (SEQUENCES * spread)))
    room = math.ceil(int(lengths.sum()) / (steps * spread))
    return 1, min(max_length, max(room, int(lengths.max())))


def sentence(lengths: np.ndarray, rows: int, room: int, epoch_steps: int, steps: int) -> str:
    """What was chosen. rows: of a step."""
    counted = f"{rows} row{'s' if rows > 1 else ''} of up to {room} tokens"
    few = "" if steps >= 5 else f"; the whole run has {_count(steps)}, and more epochs make more"
    return (
        f"{len(lengths)} sequences of {int(lengths.sum())} tokens: a step reads {counted}, about {len(lengths) / epoch_steps:.3g} of them, "
        f"which makes {_count(epoch_steps)} a pass; batch_size is for another choice{few}"
    )


def _count(steps: int) -> str:
    return f"{steps} step{'s' if steps > 1 else ''}"
