"""The rows of data files in chunks, which are the unit of parallel work and of what an interrupted run need not do again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foveate.files.data_files import CONTINUES, PIECE, Row, data_files
from foveate.files.readers import characters, json_line_row, json_lines, kind_of, rows_of

CHUNK_BYTES = 2**21
CHUNK_ROWS = 4096
DOCUMENTS = ("pieces", "paragraphs", "lines")


class BadRow(NamedTuple):
    """A row that cannot be read, under bad_rows="remove". shown: what stood there, with U+FFFD for what is no UTF-8."""

    place: str
    error: str
    shown: str


class Chunk(NamedTuple):
    """rows: those of a table or a text; or of JSON lines, not yet read, (line number, row number, bytes) each, with their file."""

    number: int
    rows: list[Any]
    file: str | None
    size: int  # bytes, about

    def read(self, bad_rows: str) -> list[Row | BadRow]:
        if self.file is None:
            return self.rows
        rows: list[Row | BadRow] = []
        for line, count, text in self.rows:
            try:
                rows.append(json_line_row(self.file, line, count, text))
            except ValueError as error:
                if bad_rows != "remove":
                    raise
                rows.append(BadRow(f"line {line} of {self.file}", str(error), text.decode("utf-8", "replace")))
        return rows


class Corpus:
    """paths: files and folders, as `foveate.files.data_files` reads them, in this order; the files of a folder by name.

    documents: how a text file is divided. "pieces": about 64 thousand characters each, as training cuts it; "paragraphs": parted by empty
    lines; "lines": each line that is not empty. Rows of other files are one document each.
    """

    def __init__(
        self, paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str], documents: str = "pieces"
    ) -> None:
        if documents not in DOCUMENTS:
            raise ValueError(f"documents={documents!r} must be one of {', '.join(DOCUMENTS)}")
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not given:
            raise ValueError("there are no files to read; name at least one file or folder")
        self.documents = documents
        self.files = [file for path in given for file in data_files(os.fspath(path))]
        if len({file.resolve() for file in self.files}) < len(self.files):
            twice = next(
                file for i, file in enumerate(self.files) if file.resolve() in {f.resolve() for f in self.files[:i]}
            )
            raise ValueError(f"{twice} is named twice; its documents would count as their own duplicates")

    def signature(self) -> list[list[Any]]:
        """What tells whether the files are still those of an interrupted run: path, bytes, time of writing."""
        parts = [part for file in self.files for part in (sorted(file.rglob("*")) if file.is_dir() else [file])]
        entries: list[list[Any]] = [
            [str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns] for part in parts
        ]
        return [[self.documents], *entries]

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(entry[1] for entry in self.signature()[1:])

    def rows(self) -> Iterator[Row]:
        """One after the other, in this process."""
        for file in self.files:
            yield from self._rows(file)

    def chunks(self) -> Iterator[Chunk]:
        """Cut by sizes alone, so the same files give the same chunks in every run. A chunk is of one file."""
        number = 0
        for file in self.files:
            name = str(file) if _by_lines(file) else None
            rows: list[Any] = []
            size = 0
            sized: Iterator[tuple[Any, int]] = (
                ((line, len(line[2])) for line in json_lines(file))
                if name
                else ((row, _size(row)) for row in self._rows(file))
            )
            for row, length in sized:
                rows.append(row)
                size += length
                if size >= CHUNK_BYTES or len(rows) >= CHUNK_ROWS:
                    yield Chunk(number, rows, name, size)
                    number, rows, size = number + 1, [], 0
            if rows:
                yield Chunk(number, rows, name, size)
                number += 1

    def _rows(self, file: Path) -> Iterator[Row]:
        if self.documents != "pieces" and not file.is_dir() and kind_of(file) == ".txt":
            return _paragraphs(file) if self.documents == "paragraphs" else _lines(file)
        return rows_of(file)


def _by_lines(file: Path) -> bool:
    """Whether the file's rows are lines that workers can read as JSON."""
    if file.is_dir() or kind_of(file) not in (".jsonl", ".ndjson"):
        return False
    first = next(json_lines(file), None)
    return first is None or not first[2].startswith(b"[")  # a list by the name of lines


def _size(row: Row) -> int:
    return sum(len(value) if isinstance(value, str) else 8 for value in row.values())


def _lines(file: Path) -> Iterator[Row]:
    with characters(file) as stream:
        for number, line in enumerate(stream, 1):
            if text := line.rstrip("\n"):
                yield Row({"text": text}, f"line {number} of {file}")


def _paragraphs(file: Path) -> Iterator[Row]:
    lines: list[str] = []
    first = 1
    with characters(file) as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                first = first if lines else number
                lines.append(line)
            elif lines:
                yield Row({"text": "".join(lines).rstrip("\n")}, f"line {first} of {file}")
                lines = []
    if lines:
        yield Row({"text": "".join(lines).rstrip("\n")}, f"line {first} of {file}")


def text_of(row: Row, field: str) -> str:
    """ValueError with the place and the fields for a row that has no text there."""
    value = row.get(field)
    if isinstance(value, str):
        return value
    names = ", ".join(repr(name) for name in row if name != CONTINUES) or "none"
    kind = f", but a {type(value).__name__}" if field in row else ""
    raise ValueError(
        f"{row.place}: there is no text in {field!r}{kind}; the fields are {names}: name the right one as text_field"
    )


__all__ = ["CHUNK_BYTES", "CONTINUES", "DOCUMENTS", "PIECE", "BadRow", "Chunk", "Corpus", "Row", "text_of"]
