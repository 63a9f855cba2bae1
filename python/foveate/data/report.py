"""The HTML report of a run: numbers, reasons, and documents before and after; one file without scripts, everything in it escaped."""

from __future__ import annotations

import difflib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1f24; background: #fff; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } .meter { background: #d0d7de; height: .6rem; width: 14rem; }
.meter i { background: #0969da; display: block; height: 100%; } .pair { display: grid; gap: 1rem; grid-template-columns: 1fr 1fr; }
pre { background: #f6f8fa; border-radius: 6px; font: 13px/1.45 ui-monospace, monospace; margin: 0; overflow-wrap: anywhere; padding: .7rem;
  white-space: pre-wrap; } del { background: #ffd8d3; text-decoration: none; } ins { background: #ccf1d3; text-decoration: none; }
.place { color: #57606a; font-size: 13px; margin: 1rem 0 .2rem; } summary { cursor: pointer; font-weight: 600; }
@media (prefers-color-scheme: dark) { body { background: #0d1117; color: #e6edf3; } pre { background: #161b22; }
  .meter { background: #30363d; }
  del { background: #67221f; } ins { background: #1b4527; } .place { color: #8d96a0; } }
"""
_LONGEST_DIFF = 1200  # characters of a side, beyond which a word-by-word comparison is slow


def write_report(
    file: Path,
    command: str,
    summary: Mapping[str, Any],
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Mapping[str, Any],
) -> None:
    """samples: {label: [{"place", "before", "after" or None, "cut"}]}; found: what the command returns."""
    documents = max(1, int(summary["documents"]))
    numbers = {
        "documents": summary["documents"], "kept": summary["kept"], "removed": summary["removed"], "changed": summary["changed"],
        "bytes of text before": summary["bytes_in"], "bytes of text after": summary["bytes_out"],
    }  # fmt: skip
    body = [
        f"<h1>foveate data {_text(command)}</h1>",
        _table((name, f"{int(value):,}") for name, value in numbers.items()),
        _bars("Why documents were removed", summary["reasons"], documents),
        _bars("What was done to documents", summary["labels"], documents),
        "<h2>Options</h2>",
        _table((name, str(value)) for name, value in settings.items()),
        "<h2>Samples</h2>",
        *(_label(label, samples[label]) for label in sorted(samples)),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>foveate data {_text(command)}</title><style>{_STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8", errors="replace")


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _table(rows: Any) -> str:
    cells = "".join(f'<tr><td>{_text(name)}</td><td class="number">{_text(value)}</td></tr>' for name, value in rows)
    return f"<table>{cells}</table>"


def _bars(title: str, counts: Mapping[str, int], documents: int) -> str:
    if not counts:
        return ""
    rows = "".join(
        f'<tr><td>{_text(name)}</td><td class="number">{count:,}</td><td class="number">{count / documents:.1%}</td>'
        f'<td><div class="meter"><i style="width:{min(100, 100 * count / documents):.1f}%"></i></div></td></tr>'
        for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    )
    return f"<h2>{_text(title)}</h2><table>{rows}</table>"


def _label(label: str, samples: Sequence[Mapping[str, Any]]) -> str:
    shown = "".join(_sample(sample) for sample in samples)
    return f"<details open><summary>{_text(label)}</summary>{shown}</details>"


def _sample(sample: Mapping[str, Any]) -> str:
    start = f", from character {sample['cut']}" if sample["cut"] else ""
    place = f'<p class="place">{_text(sample["place"])}{start}</p>'
    if sample["after"] is None:
        return f"{place}<pre><del>{_text(sample['before'])}</del></pre>"
    before, after = _compared(sample["before"], sample["after"])
    return f'{place}<div class="pair"><pre>{before}</pre><pre>{after}</pre></div>'


def _compared(before: str, after: str) -> tuple[str, str]:
    a, b = before[:_LONGEST_DIFF], after[:_LONGEST_DIFF]
    left, right = [], []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, _words(a), _words(b), autojunk=False).get_opcodes():
        old, new = _text("".join(_words(a)[i:j])), _text("".join(_words(b)[k:m]))
        left.append(old if kind == "equal" or not old else f"<del>{old}</del>")
        right.append(new if kind == "equal" or not new else f"<ins>{new}</ins>")
    return "".join(left), "".join(right)


def _words(text: str) -> list[str]:
    parts: list[str] = []
    for line in text.split(" "):
        parts += [line, " "]
    return parts[:-1]
