"""The rows of a local file, and their fields by any of the names that public data sets use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.files.data_files import data_files
from foveate.files.readers import rows_of

NAMES: dict[str, tuple[str, ...]] = {
    "question": ("question", "query", "context", "prompt", "ctx", "sentence", "goal"),
    "choices": ("choices", "options", "endings", "answers"),
    "label": ("answer", "label", "gold", "answer_index", "target"),
    "prompt": ("prompt", "question", "input", "instruction"),
    "answer": ("answer", "answers", "target", "output", "reference", "completion"),
    "text": ("text", "content", "sentence"),
    "class": ("label", "class", "category"),
    "test": ("test", "tests", "test_code"),
    "more": ("more", "sent_more", "stereotype_sentence", "pro"),
    "less": ("less", "sent_less", "anti_stereotype_sentence", "anti"),
    "type": ("type", "bias_type", "category", "group"),
}


def rows(file: str | Path, limit: int | None = None) -> list[Any]:
    """The rows of a file or folder that `foveate data` can read. ValueError for an empty one, and for a limit below 1."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be 1 or more")
    found: list[Any] = []
    for place in data_files(str(file)):
        for row in rows_of(place):
            found.append(row)
            if len(found) == limit:
                return found
    if not found:
        raise ValueError(f"{file} has no rows")
    return found


def has(row: Mapping[str, Any], *names: str) -> bool:
    return all(any(row.get(key) is not None for key in NAMES[name]) for name in names)


def take(row: Mapping[str, Any], name: str, kind: type = str) -> Any:
    """The field by the first of its names. ValueError, with the row's place, for one that is missing or of another type."""
    place = getattr(row, "place", "a row")
    for key in NAMES[name]:
        if row.get(key) is not None:
            value = row[key]
            if not isinstance(value, kind):
                raise ValueError(f"{place} has {key}={value!r:.60}, which must be a {kind.__name__}")
            return value
    raise ValueError(
        f"{place} has no {name}; it is a field called {' or '.join(NAMES[name])}, and there are {', '.join(row)}"
    )


def answers(row: Mapping[str, Any]) -> list[str]:
    """The accepted answers: a text, a list of texts, or SQuAD's {"text": [...]}."""
    value = take(row, "answer", object)
    value = value.get("text", []) if isinstance(value, Mapping) else value
    listed = [value] if isinstance(value, (str, int, float)) else list(value)
    found = [str(entry.get("text") if isinstance(entry, Mapping) else entry) for entry in listed]
    if not found:
        raise ValueError(f"{getattr(row, 'place', 'a row')} has no answer; an empty list cannot be met")
    return found


def choices(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """The texts, and the number of the right one: given as a number from 0, a letter from A, or the text itself."""
    place = getattr(row, "place", "a row")
    given = take(row, "choices", object)
    labels: Sequence[str] = [chr(65 + i) for i in range(26)]
    if isinstance(given, Mapping):  # ARC's {"text": [...], "label": ["A", ...]}
        labels, given = list(map(str, given.get("label", labels))), given.get("text", [])
    texts = [str(text) for text in given]
    if len(texts) < 2:
        raise ValueError(f"{place} has {len(texts)} choices; it needs at least 2")
    key = next((k for k in (*NAMES["label"], "answerKey") if row.get(k) is not None and row[k] is not given), None)
    if key is None:
        raise ValueError(
            f"{place} does not say which choice is right; give answer, as a number from 0, a letter or the text"
        )
    value = row[key]
    if isinstance(value, str):
        if value in texts:
            return texts, texts.index(value)
        if value.strip() in labels[: len(texts)]:
            return texts, list(labels).index(value.strip())
        value = int(value) if value.strip().isdigit() else -1
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(texts):
        raise ValueError(f"{place} has {key}={row[key]!r}, which names none of its {len(texts)} choices")
    return texts, value
