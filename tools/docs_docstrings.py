"""An extension of griffe, which reads the package for the site: docstrings here are plain text with formulas, not Markdown.

Outside of backticks and indented blocks, what Markdown would take for emphasis, links or HTML is escaped: `2**x`, `[B, S, H, D]`, `_x`.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_MARKUP = re.compile(r"([\\*_\[\]<>|#])")


def escaped(text: str) -> str:
    """`text` as Markdown that shows the same characters; code in backticks and blocks indented by four stay code."""
    lines = []
    for line in text.split("\n"):
        if line.startswith("    "):
            lines.append(line)
            continue
        parts = line.split("`")  # every second part stands in backticks, unless one is left open
        closed = len(parts) % 2 == 1
        lines.append("`".join(part if closed and i % 2 else _MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts)))
    return "\n".join(lines)


class PlainDocstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = escaped(obj.docstring.value)
