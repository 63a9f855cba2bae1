"""The classes of a classifier: what of a row is its label, and in which order classes are numbered."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.train.data.examples import at_row


@dataclass(frozen=True)
class Classes:
    """names in the order of their numbers; counts: rows of each; several: whether a row has a list of them; known: whether they are the
    checkpoint's, so that its classifier goes on. numbered: whether rows have the numbers of the checkpoint's classes."""

    names: list[str]
    counts: list[int]
    several: bool = False
    known: bool = False
    numbered: bool = False

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def number(self, label: str) -> int:
        """ValueError for another class."""
        if self.numbered and label.isascii() and label.isdigit() and int(label) < len(self.names):
            return int(label)
        if not self.numbered and label in self._numbers:
            return self._numbers[label]
        raise ValueError(f"the label {label!r} is not one of the training data's, {', '.join(self.names)}")


def labels_of(row: dict[str, Any], field: str) -> tuple[list[str], bool]:
    """The classes of a row, and whether they were a list. ValueError where one is missing: None, NaN, an empty text."""
    value = row.get(field)
    if value is None:
        raise ValueError(f"there is no label in {field!r}; the fields are {', '.join(map(repr, row))}: set label_field")
    if isinstance(value, (list, tuple)):
        return list(dict.fromkeys(_label(part, field) for part in value)), True
    return [_label(value, field)], False


def _label(value: Any, field: str) -> str:
    if isinstance(value, (list, dict)) or value is None:
        raise ValueError(f"the label in {field!r} is {value!r:.60}; it must be a text or a number, or a list of them")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"the label in {field!r} is {value}, so it is missing; leave the row out, or give it one")
        # tables with missing values have whole numbers as floats
        return str(int(value)) if value.is_integer() else str(value)
    text = str(value)
    if not text.strip():
        raise ValueError(f"the label in {field!r} is an empty text; leave the row out, or give it one")
    return text


def find_classes(
    rows: Iterable[dict[str, Any]], field: str, known: Sequence[str], declared: Sequence[str] = ()
) -> Classes:
    """known: the checkpoint's classes. They stay if no others occur, or if all labels are their numbers; else the classes are those that
    the data declare, or those that occur, in the order of numbers if all are, of code points if not.

    ValueError for rows without a label, and for a single class.
    """
    found: Counter[str] = Counter()
    several: bool | None = None
    for row in rows:
        try:
            labels, many = labels_of(row, field)
        except ValueError as error:
            raise at_row(row, error) from error
        several = many if several is None else several
        found.update(labels)
    several = bool(several)
    if found and known:
        if found.keys() <= set(known):
            return Classes(list(known), [found[name] for name in known], several, known=True)
        numbers = [str(i) for i in range(len(known))]
        if found.keys() <= set(numbers):
            return Classes(list(known), [found[i] for i in numbers], several, known=True, numbered=True)
    if declared and found.keys() <= set(declared):
        return Classes(list(declared), [found[name] for name in declared], several)
    if len(found) == 1 and not several:
        raise ValueError(
            f"all rows have the label {next(iter(found))!r}; a classifier needs rows of two classes or more"
        )
    names = _ordered(found)
    return Classes(names, [found[name] for name in names], several)


def _ordered(names: Iterable[str]) -> list[str]:
    names = sorted(names)
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return names
    return sorted(names, key=values.__getitem__) if all(map(math.isfinite, values.values())) else names


def class_weights(given: Sequence[str], classes: Classes) -> Tensor | None:
    """fp32 [classes]. "balanced": rows / (classes * rows of the class); else CLASS=WEIGHT, 1 for the others. None where none is given."""
    if not given:
        return None
    if classes.several:
        raise ValueError("class_weights are for one class a row; omit them where rows have lists of classes")
    if list(given) == ["balanced"]:
        absent = [name for name, count in zip(classes.names, classes.counts) if not count]
        if absent:
            raise ValueError(
                f"class_weights=balanced divides by the rows of each class, and {', '.join(absent)} has none; give weights as CLASS=X"
            )
        counts = torch.tensor(classes.counts, dtype=torch.float32)
        return counts.sum() / (len(counts) * counts)
    weights = torch.ones(len(classes.names))
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if name not in classes.names or not 0 < weight < math.inf:
            raise ValueError(
                f"class_weights={text!r} is not CLASS=X, a class and a number above 0; the classes are {', '.join(classes.names)}"
            )
        weights[classes.names.index(name)] = weight
    return weights
