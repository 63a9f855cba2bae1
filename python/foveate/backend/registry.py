"""Which backend serves a call. Each op registers, per backend, supports(query) -> None or the sentence why not.

`choose` is the only place where that is decided. A named backend that cannot serve the call raises; only the automatic
choice (backend=None) walks down the order native, triton, reference. Answers are cached by (op, query, backend).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import NamedTuple

ORDER = ("native", "triton", "reference")


class UnsupportedError(ValueError):
    """The named backend cannot serve this call; the message gives the reason and the backends that can."""


class Query(NamedTuple):
    """What a choice may depend on. Hashable, so that the choice is made once."""

    device: str  # "cpu", "cuda", ...
    dtype: object  # torch.dtype
    features: tuple[Hashable, ...] = ()  # names of the options in use, sizes that matter: the op's own vocabulary


Supports = Callable[[Query], "str | None"]
_supports: dict[tuple[str, str], Supports] = {}


def register(op: str, backend: str, supports: Supports) -> None:
    _supports[op, backend] = supports


def registered() -> list[tuple[str, str]]:
    """(op, backend) of each registration."""
    return list(_supports)


def why_not(op: str, backend: str, query: Query) -> str | None:
    """None if `backend` can serve `op` for this query, else the reason as a sentence."""
    supports = _supports.get((op, backend))
    if supports is None:
        return f"{backend} has no {op}"
    return supports(query)


_forget: list[Callable[[], None]] = []


def forget_with_choices(clear: Callable[[], None]) -> None:
    """clear: empties a cache of answers of `choose`, for `forget_choices`."""
    _forget.append(clear)


def forget_choices() -> None:
    """After a change of what backends answer, as tests make."""
    choose.cache_clear()
    for clear in _forget:
        clear()


@functools.lru_cache(maxsize=4096)
def choose(op: str, query: Query, backend: str | None) -> str:
    """The name of the backend that serves the call."""
    if backend is not None:
        if backend not in ORDER:
            raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(ORDER)} or None for the best")
        reason = why_not(op, backend, query)
        if reason is None:
            return backend
        able = [name for name in ORDER if why_not(op, name, query) is None]
        raise UnsupportedError(
            f"backend={backend!r} cannot serve {op}: {reason}; backends that can: {', '.join(able) or 'none'}"
        )
    reasons = []
    for name in ORDER:
        reason = why_not(op, name, query)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise UnsupportedError(f"no backend can serve {op}: " + "; ".join(reasons))
