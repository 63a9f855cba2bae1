"""What of a forward pass is to be recorded, checked against the model and the length of the text."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.inspect.parts import Parts

DEFAULT_ROWS = 32  # of a longer text, the last ones
MAX_WEIGHTS = 1 << 28  # numbers of attention that are kept: 1 GiB


@dataclass(frozen=True)
class Wanted:
    """layers, heads, rows: from 0 on; () for layers or heads records no attention. lens_top, top: 0 for none of it."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    rows: tuple[int, ...]
    lens_top: int = 0
    top: int = 0
    choices: bool = False
    rollout: bool = False

    @property
    def attention(self) -> bool:
        return bool(self.layers and self.heads)


def wanted(
    parts: Parts,
    tokens: int,
    *,
    attention: bool = True,
    layers: Any = None,
    heads: Any = None,
    rows: Any = None,
    lens_top: int = 0,
    top: int = 0,
    choices: bool = False,
    rollout: bool = False,
    max_weights: int = MAX_WEIGHTS,
) -> Wanted:
    """ValueError or TypeError, in a sentence, for what the model or the text does not have, and for more than `max_weights` numbers."""
    for name, number in (("lens_top", lens_top), ("top", top)):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 100:
            raise ValueError(f"{name}={number!r} must be an integer from 0 (none) to 100")
    if (lens_top or choices) and not parts.has_vocabulary:
        raise ValueError(
            f"a {type(parts.model).__name__} has no language-model head, so its hidden states cannot be read as tokens; leave the "
            "logit lens and the alternatives out (lens_top=0, choices=False)"
        )
    found_rows = (
        range(max(0, tokens - DEFAULT_ROWS), tokens) if rows is None else places("rows", "tokens", rows, tokens)
    )
    chosen = (
        places("layers", "layers", range(parts.num_layers) if layers is None else layers, parts.num_layers),
        places("heads", "heads", range(parts.num_heads) if heads is None else heads, parts.num_heads),
    )
    if not attention:
        chosen = ((), ())
    count = len(chosen[0]) * len(chosen[1]) * len(found_rows) * tokens
    if count > max_weights:
        raise ValueError(
            f"{len(chosen[0])} layers x {len(chosen[1])} heads x {len(found_rows)} rows x {tokens} keys are {count} numbers, more than "
            f"{max_weights}; choose fewer layers, heads or rows"
        )
    return Wanted(chosen[0], chosen[1], tuple(found_rows), lens_top, top, choices, rollout)


def places(name: str, what: str, given: int | Sequence[int] | Iterable[int], size: int) -> tuple[int, ...]:
    """Integers from -size to size - 1 as such from 0 on."""
    if isinstance(given, (str, bytes)):
        raise TypeError(f"{name}={given!r} must be integers")
    chosen: list[int] = []
    for place in given if isinstance(given, Iterable) else [given]:
        if isinstance(place, bool) or not isinstance(place, numbers.Integral):
            raise TypeError(f"{name} has {place!r}, which is no integer")
        if not -size <= place < size:
            raise ValueError(f"{name} has {place}; there are {size} {what}, so {name} go from {-size} to {size - 1}")
        chosen.append(int(place) % size)
    if not chosen:
        raise ValueError(f"{name} is empty; give one or more, or None")
    return tuple(chosen)
