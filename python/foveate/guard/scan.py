"""How a rule looks at a text that is still growing: what it finds, and from where on more text could change that."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

SIDES = ("input", "output")
ACTIONS = ("flag", "redact", "block")  # from the mildest on
LONGEST_UNIT = 400  # characters of a sentence that is judged
_END = re.compile(
    r"""[.!?\u2026]+["'\u201d\u2019\u00bb)\]]*\s+|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d\uff09]*\s*|\n\s*"""
)


class Span(NamedTuple):
    """start, end: places in the window's text. label: what of the rule it was, such as "email"."""

    start: int
    end: int
    label: str


class Window(NamedTuple):
    """text[at:] is what has not been let out; before it stands what was, for context. offset: of text[0] in the whole text.
    final: no more comes."""

    text: str
    at: int
    offset: int
    final: bool


class Scanner:
    """One rule over one text."""

    def open(self, window: Window) -> int:
        """From where on a match may still begin or grow; the length of the text if nowhere. At least window.at."""
        raise NotImplementedError

    def find(self, window: Window) -> Iterable[Span]:
        """What begins at window.at or later, as far as it is certain before `open`."""
        raise NotImplementedError


@functools.lru_cache(512)
def _growing(pattern: str, flags: int) -> Any:
    """Matches nowhere, and partly where a match of the pattern could begin that reaches the end of the text."""
    return needed_library().compile(f"(?:{pattern})(?s:.)(?!)", flags)


def needed_library() -> Any:
    """regex, which can tell where a match could begin that is not complete. ImportError without it."""
    try:
        import regex
    except ImportError as error:
        raise ImportError('the guard needs regex: pip install "foveate[guard]"') from error
    return regex


def first_open(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where the first match of the pattern begins that more text could still complete, lengthen or undo."""
    regex = needed_library()
    flags = sum(
        int(theirs) for ours, theirs in (
            (re.IGNORECASE, regex.IGNORECASE), (re.DOTALL, regex.DOTALL), (re.MULTILINE, regex.MULTILINE), (re.VERBOSE, regex.VERBOSE),
            (re.ASCII, regex.ASCII),
        ) if pattern.flags & ours
    )  # fmt: skip
    found = _growing(pattern.pattern, flags).search(text, at, partial=True)
    return len(text) if found is None else int(found.start())


class PatternScanner(Scanner):
    """patterns: by label. find: what a text has of them, where that is more than all matches. Neither has a state."""

    def __init__(
        self, patterns: Sequence[tuple[str, re.Pattern[str]]], find: Callable[[str], Iterable[Span]] | None = None
    ) -> None:
        self._patterns, self._find = patterns, find

    def open(self, window: Window) -> int:
        if window.final:
            return len(window.text)
        return min(
            (first_open(pattern, window.text, window.at) for _, pattern in self._patterns), default=len(window.text)
        )

    def find(self, window: Window) -> Iterator[Span]:
        if self._find is not None:
            yield from (span for span in self._find(window.text) if span.start >= window.at)
            return
        for label, pattern in self._patterns:
            for match in pattern.finditer(window.text, window.at):
                if match.end() > match.start():
                    yield Span(match.start(), match.end(), label)


class SentenceScanner(Scanner):
    """judge: for each of some sentences a label, None for one that is fine. A sentence is judged once, when it has ended."""

    def __init__(self, judge: Callable[[list[str]], list[str | None]]) -> None:
        self._judge = judge
        self._next = 0  # where the sentence begins that has not ended, in the whole text
        self._found: list[Span] = []  # places in the whole text

    def open(self, window: Window) -> int:
        units = list(self._ended(window))
        if units:
            texts = [window.text[start:end] for start, end in units]
            for (start, end), label in zip(units, self._judge(texts)):
                if label is not None:
                    self._found.append(Span(start + window.offset, end + window.offset, label))
            self._next = units[-1][1] + window.offset
        return max(window.at, self._next - window.offset)

    def _ended(self, window: Window) -> Iterator[tuple[int, int]]:
        text, start = window.text, self._next - window.offset
        while start < len(text):
            match = _END.search(text, start, start + LONGEST_UNIT)
            if match is not None and (window.final or match.end() < len(text)) and match.end() < start + LONGEST_UNIT:
                end = match.end()
            elif len(text) - start >= LONGEST_UNIT:
                space = text.rfind(" ", start, start + LONGEST_UNIT)
                end = space + 1 if space > start else start + LONGEST_UNIT
            elif window.final:
                end = len(text)
            else:
                return
            yield start, end
            start = end

    def find(self, window: Window) -> Iterator[Span]:
        for start, end, label in self._found:
            if start - window.offset >= window.at:
                yield Span(start - window.offset, end - window.offset, label)


class LengthScanner(Scanner):
    """most: characters; the one after them is the finding."""

    def __init__(self, most: int) -> None:
        self._most = most

    def open(self, window: Window) -> int:
        return len(window.text)

    def find(self, window: Window) -> Iterator[Span]:
        place = self._most - window.offset
        if window.at <= place < len(window.text):
            yield Span(place, place + 1, "length")
