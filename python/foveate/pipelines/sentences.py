"""Where a text may be divided: at the ends of sentences, else between words."""

from __future__ import annotations

import re
from collections.abc import Callable

# A sentence's end: its marks, closing quotes and brackets, and then a space or the end; the marks of Chinese and Japanese need no space.
_END = re.compile(
    r"""(?:[.!?\u2026\u061f\u0964]+["'\u201d\u2019\u00bb)\]]*(?=\s|$))|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\uff09]*"""
)
_NO_END = re.compile(
    r"(?:^|[\s(\[])(?:[A-Z]|[Dd]r|[Mm]rs?|[Mm]s|[Pp]rof|[Ss]t|[Jj]r|[Ss]r|vs|etc|[Ee]\.g|[Ii]\.e|[Nn]o|[Vv]ol|[Pp]p|[Ff]ig|[Aa]pprox|"
    r"[Bb]zw|[Nn]r|[Hh]r|[Ff]r|z\.B|d\.h|[Uu]\.a|M|Mme|Mlle|[Ss]ra?|[Cc]f)\.$"
)


def sentences(text: str) -> list[str]:
    """The sentences of a line, without the spaces around them. Initials and common abbreviations do not end one."""
    found, start = [], 0
    for match in _END.finditer(text):
        after = text[match.end() :].lstrip()
        # a small letter goes on with the sentence
        if match[0].startswith(".") and (_NO_END.search(text[start : match.end()]) or after[:1].islower()):
            continue
        found.append(text[start : match.end()].strip())
        start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def divided(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The sentences of a line, those that do not fit cut between words, and words that do not in their middle."""
    parts: list[str] = []
    for sentence in sentences(text):
        waiting = [sentence]
        while waiting:
            part = waiting.pop()
            if len(part) < 2 or fits(part):
                parts.append(part)
                continue
            middle = len(part) // 2
            spaces = [match.start() for match in re.finditer(r"\s", part) if 0 < match.start() < len(part) - 1]
            at = min(spaces, key=lambda place: abs(place - middle), default=middle)
            waiting += [part[at:].strip(), part[:at].strip()]
    return parts
