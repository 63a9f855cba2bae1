"""The support matrix of docs/support.md: every option, dtype and op against every backend, forward and backward, as `supports` answers.

Nothing here says what works; foveate.backend.registry is asked what `foveate.attention` and the others would be told.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from foveate.backend import registry
from foveate.backend.registry import Query
from foveate.ops.attention.operands import Used, query

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEVICES = {"native": ("cpu", "cuda"), "triton": ("cuda",), "reference": ("cpu", "cuda")}

# What a served cell says. No GPU has run the package yet, so its columns say how they are tested; see that page's words on them.
_SERVED = {
    ("native", "cpu"): "yes",
    ("native", "cuda"): "emulated",
    ("triton", "cuda"): "interpreted",
    ("reference", "cpu"): "yes",
    ("reference", "cuda"): "not run",
}

# Ops whose backward has an entry of its own in the backend table; the others have None (no backward) or one answer for both.
_BACKWARD: dict[str, str | None] = {
    "attention": "attention_backward",
    "attention_with_kv_cache": None,
    "apply_rotary": "apply_rotary",
}

_TITLES: dict[str | None, str] = {None: "no option", "varlen": "`attention_varlen`"}

Columns = list[tuple[str, str]]


def _attention_query(device: str, dtype: torch.dtype, option: str | None = None) -> Query:
    return query(device, dtype, 64, 64, Used() if option is None else Used(**{option: True}))


def _columns() -> Columns:
    """Backends on devices that serve plain fp32 attention."""
    pairs = [(backend, device) for backend in registry.ORDER for device in DEVICES[backend]]
    return [
        (backend, device)
        for backend, device in pairs
        if registry.why_not("attention", backend, _attention_query(device, torch.float32)) is None
    ]


def served(backend: str, device: str, option: str) -> tuple[bool, bool]:
    """Whether the backend's forward and backward take fp32 attention with the option."""
    query = _attention_query(device, torch.float32, option)
    forward, backward = (registry.why_not(op, backend, query) for op in ("attention", "attention_backward"))
    return forward is None, backward is None


def _line(title: str, columns: Columns, op: str, query: Callable[[str], Query], notes: list[str]) -> str:
    cells = []
    for backend, device in columns:
        for name in (op, _BACKWARD.get(op, op)):
            if name is None:
                cells.append("-")
                continue
            reason = registry.why_not(name, backend, query(device))
            if reason is not None and reason not in notes:
                notes.append(reason)
            cells.append(_SERVED[backend, device] if reason is None else f"no ({notes.index(reason) + 1})")
    return f"| {title} | " + " | ".join(cells) + " |"


def matrix() -> str:
    """Two Markdown tables, options and dtypes of attention, then the other ops, with the sentences of the refusals below."""
    columns, notes = _columns(), list[str]()
    header = " | ".join(f"{backend}, {device} {way}" for backend, device in columns for way in ("forward", "backward"))
    rule = "|---" * (1 + 2 * len(columns)) + "|"

    lines = [f"| `attention` with | {header} |", rule]
    for option in (None, *Used._fields):
        title = _TITLES.get(option, f"`{option}`")
        query = partial(_attention_query, dtype=torch.float32, option=option)
        lines.append(_line(title, columns, "attention", query, notes))
    for dtype in DTYPES:
        lines.append(_line(_name(dtype), columns, "attention", partial(_attention_query, dtype=dtype), notes))

    lines += ["", f"| function | {header} |", rule]
    for op in sorted({op for op, _ in registry._supports} - {"attention", "attention_backward"}):
        answers = {dtype: _line("", columns, op, partial(Query, dtype=dtype), notes) for dtype in DTYPES}
        plain = answers.pop(torch.float32)
        lines.append(f"| `{op}`{plain[2:]}")
        lines += [f"| `{op}`, {_name(dtype)}{cells[2:]}" for dtype, cells in answers.items() if cells != plain]

    lines += ["", "A dash: the function has no backward." + (" The numbers stand for:" if notes else "")]
    return "\n".join([*lines, *([""] if notes else []), *(f"{n}. {reason}." for n, reason in enumerate(notes, 1))])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
