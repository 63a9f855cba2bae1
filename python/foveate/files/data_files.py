"""Which files hold the data that a path stands for, and their rows, one after the other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from foveate.files import readers
from foveate.files.class_labels import DATASET, class_labels
from foveate.files.readers import CONTINUES, LONGEST_PIECE, PIECE, SUFFIXES, Row, kind_of

__all__ = [
    "CONTINUES",
    "LONGEST_PIECE",
    "PIECE",
    "Row",
    "data_files",
    "declared_labels",
    "left_out",
    "read_rows",
    "strings",
]

_KNOWN = f"data files end in {', '.join(SUFFIXES)}, the texts also in .gz, .bz2, .xz or .zst after it"
_SPLITS = "dataset_dict.json"  # of the datasets library
_DESCRIPTIONS = ("dataset_infos.json",)  # JSON about the data, not data


def read_rows(paths: Sequence[str]) -> Iterator[Row]:
    """Rows as dictionaries that know their place, {"text": ...} for text files.

    A text file is cut into documents of about 64 thousand characters, before a line that does not begin with white space (at 256
    thousand anywhere), all but the last one with CONTINUES. JSON is a list of objects, JSON lines, an object with one list of objects,
    or SQuAD's format, which gives {"id", "question", "context", "answers": [{"text", "answer_start"}]}. In CSV and TSV the first line
    has the names, and an empty cell is None. Numbers of a ClassLabel of the datasets library become the names of the classes.
    FileNotFoundError and ValueError with the place of what cannot be read.
    """
    for path in paths:
        for file in data_files(path):
            yield from readers.rows_of(file)


def strings(value: Any) -> Iterator[str]:
    """Every text in a row, whatever its fields are."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def declared_labels(paths: Sequence[str], field: str) -> list[str] | None:
    """The names of the classes in `field`, in their order, if every file declares the same ones (a ClassLabel of the datasets library)."""
    labels = [class_labels(file).get(field) for path in paths for file in data_files(path)]
    first = labels[0] if labels else None
    return first if all(names == first for names in labels) else None


def data_files(path: str) -> list[Path]:
    """The files that `path` stands for; a folder that the datasets library wrote is one of them."""
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"the data {path} does not exist")
    if place.is_dir():
        files, others = _walk(place)
        if not files:
            others_there = f"; it has {_names(place, others)}" if others else ""
            raise ValueError(f"the folder {path} has no data: {_KNOWN}{others_there}")
        return files
    if not place.is_file():
        raise ValueError(
            f"{path} is neither a file nor a folder; the data are read more than once, so a pipe cannot be data"
        )
    if kind_of(place) is None:
        raise ValueError(f"{path} is of no known kind; {_KNOWN}")
    return [place]


def left_out(path: str) -> str | None:
    """A sentence about the files in the folder `path` that are of no known kind, if there are any. Hidden ones are not counted."""
    place = Path(path).expanduser()
    others = _walk(place)[1] if place.is_dir() else []
    return f"{path}: left out {_names(place, others)}, as {_KNOWN}" if others else None


def _names(place: Path, files: Sequence[Path]) -> str:
    named = ", ".join(str(file.relative_to(place)) for file in files[:3])
    return named if len(files) <= 3 else f"{named} and {len(files) - 3} more files"


def _walk(folder: Path) -> tuple[list[Path], list[Path]]:
    """The data in a folder, through links too, in order of their names, and the other files. Nothing that is hidden."""
    files: list[Path] = []
    others: list[Path] = []
    seen: set[str] = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = Path(here)
        real = os.path.realpath(here)
        hidden = [name for name in folders if name.startswith(".") or name == "__MACOSX"]
        folders[:] = sorted(name for name in folders if name not in hidden)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        if _SPLITS in names:
            raise ValueError(_several(place))
        if DATASET in names:
            files.append(place)
            folders.clear()
            continue
        for name in sorted(names):
            file = place / name
            if name.startswith(".") or name in _DESCRIPTIONS:
                continue
            (files if kind_of(file) is not None and file.is_file() else others).append(file)
    return sorted(files), sorted(others)


def _several(folder: Path) -> str:
    try:
        splits = [str(name) for name in json.loads((folder / _SPLITS).read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / _SPLITS} is damaged ({error}); name the folder of one of the data sets in {folder}"
    example = folder / splits[0] if splits else folder
    return f"{folder} holds several data sets, {', '.join(splits)}; name one of them: {example}"
