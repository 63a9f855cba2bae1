"""The rows of one data file: text, JSON, JSON lines, CSV, TSV, Parquet, a folder of the datasets library. Only .json is read whole."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from foveate.files.class_labels import class_labels, named

PIECE = 2**16  # characters of a text file that make a document, if a line ends there
LONGEST_PIECE = 2**18
LONGEST_LINE = 2**28  # bytes
# A field of the pieces of a file but the last one; no column of a user's has such a name.
CONTINUES = "\0continues"
_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")
_ESCAPED = re.compile(rb"\\u[dD][89a-fA-F]")
_LARGEST_CELL = 2**31 - 1  # csv's own limit is 128 thousand characters


class Row(dict[str, Any]):
    """A row that knows where it stands, for errors: place is "row 7 of chats.jsonl"."""

    def __init__(self, fields: dict[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place


def kind_of(file: Path) -> str | None:
    """The suffix that says how a file is read, be its letters large or small, without that of a compression; None for other files."""
    name = file.name.lower()
    for compression in _OPENERS:
        if name.endswith(compression) and (kind := Path(name.removesuffix(compression)).suffix) in _READERS:
            return kind if kind != ".parquet" else None
    kind = Path(name).suffix
    return kind if kind in _READERS else None


def rows_of(file: Path) -> Iterator[Row]:
    """The rows of a file of a known kind, or of a folder of the datasets library."""
    labels = class_labels(file)
    for row in _dataset(file) if file.is_dir() else _READERS[kind_of(file) or ""](file):
        if labels:
            named(row, labels, row.place)
        yield row


def _zstd(file: Path, mode: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError('a .zst file needs pyarrow: pip install "foveate[train]"') from error
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(file), mode), "zstd"))


_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, without its compression. ValueError where that is damaged."""
    opener = _OPENERS.get(file.suffix.lower())
    try:
        with open(file, "rb") if opener is None else opener(file, "rb") as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is damaged or not a whole {file.suffix} file: {error}") from error
    except OSError as error:
        if opener is None or error.errno is not None:
            raise
        raise ValueError(f"{file} is damaged or not a whole {file.suffix} file: {error}") from error


@contextlib.contextmanager
def characters(file: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """UTF-8, with or without the mark that some editors write first, or UTF-16 or UTF-32 with it."""
    with _opened(file) as stream:
        start = stream.read(4)
    encoding = next((name for mark, name in _ENCODINGS if start.startswith(mark)), "utf-8")
    with _opened(file) as stream, io.TextIOWrapper(stream, encoding=encoding, newline=newline) as text:
        try:
            yield text
        except UnicodeError as error:
            raise _no_utf8(file, error) from error


def _no_utf8(place: Path | str, error: UnicodeError) -> ValueError:
    return ValueError(f"{place} is not UTF-8 text: {error}; convert it, for instance with iconv")


def _text(file: Path) -> Iterator[Row]:
    piece, number = "", 1
    with characters(file) as stream:
        while line := stream.readline(PIECE):
            # not before white space, to which a tokenizer may join the line end; but a piece ends some time
            if len(piece) >= PIECE and (not line[0].isspace() or len(piece) >= LONGEST_PIECE):
                yield Row({"text": piece, CONTINUES: True}, f"document {number} of {file}")
                piece, number = "", number + 1
            piece += line
    if piece:
        yield Row({"text": piece}, f"document {number} of {file}")


def _byte_lines(file: Path, longest: int = -2) -> Iterator[bytes]:
    """The lines in UTF-8; those of a file in UTF-8 are not decoded, so that an error can name the line. longest: bytes of one."""
    with _opened(file) as stream:
        start = stream.read(4)
    if any(start.startswith(mark) for mark, name in _ENCODINGS[1:]):
        with characters(file, "\n") as text:
            yield from (line.encode() for line in text)
    else:
        with _opened(file) as stream:
            number = 0
            while line := stream.readline(longest + 1):
                number += 1
                if 0 < longest < len(line):
                    raise ValueError(
                        f"line {number} of {file} is longer than {longest >> 20} MiB; if the file is one list, name it .json, else cut "
                        "the row into documents"
                    )
                yield line


def _value(text: bytes, place: str) -> Any:
    """The value that JSON text stands for. A half of a surrogate pair, as cut texts have it, is refused: no token stands for it."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _no_utf8(place, error) from error
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{place} is JSON that is nested too deeply") from error
    return value


def _row(fields: Any, place: str, source: bytes) -> Row:
    if not isinstance(fields, dict):
        raise ValueError(f"{place} must be a JSON object, not a {type(fields).__name__}")
    if _ESCAPED.search(source) and (half := _HALF_A_PAIR.search(json.dumps(fields, ensure_ascii=False))):
        raise ValueError(
            f"{place} has {half[0].encode('ascii', 'backslashreplace').decode()} alone, half of a character such as an emoji that was "
            "cut; no UTF-8 text can hold it: leave the row out, or replace it"
        )
    return Row(fields, place)


def json_lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, row number, bytes) of each line that is not empty, not yet read as JSON. ValueError for one beyond LONGEST_LINE."""
    count = 0
    for number, line in enumerate(_byte_lines(file, LONGEST_LINE), 1):
        text = line.strip().removeprefix(codecs.BOM_UTF8)
        if text:
            count += 1
            yield number, count, text


def json_line_row(file: Path | str, number: int, count: int, text: bytes) -> Row:
    """What a line of `json_lines` says. ValueError with its place for what is no JSON object."""
    place = f"line {number} of {file}" if count == number else f"line {number} (row {count}) of {file}"
    fields = _value(text, place)
    if not isinstance(fields, dict):
        raise ValueError(f"{place} must be a JSON object, not a {type(fields).__name__}")
    return _row(fields, f"row {count} of {file}" + ("" if count == number else f" (line {number})"), text)


def _lines(file: Path) -> Iterator[Row]:
    for number, count, text in json_lines(file):
        if count == 1 and text.startswith(b"["):  # a list by the name of lines
            yield from _json(file)
            return
        yield json_line_row(file, number, count, text)


def _json(file: Path) -> Iterator[Row]:
    """A list of objects, an object in SQuAD's format or with one list of objects, or, as datasets and pandas write them, lines."""
    if _holds_lines(file):
        yield from _lines(file)
        return
    source = b"".join(_byte_lines(file))
    value = _value(source, str(file))
    rows = value if isinstance(value, list) else _rows_within(value, file)
    for number, fields in enumerate(rows, 1):
        yield _row(fields, f"row {number} of {file}", source)


def _holds_lines(file: Path) -> bool:
    """Whether the first line is an object by itself and others follow."""
    lines = (text for line in _byte_lines(file) if (text := line.strip().removeprefix(codecs.BOM_UTF8)))
    first = next(lines, b"")
    if not (first.startswith(b"{") and first.endswith(b"}")) or next(lines, None) is None:
        return False
    try:
        return isinstance(json.loads(first.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _rows_within(value: Any, file: Path) -> list[Any]:
    if isinstance(value, dict):
        lists = [rows for rows in value.values() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
        if len(lists) == 1:
            return lists[0] if "paragraphs" not in lists[0][0] else _squad(lists[0], file)
    raise ValueError(
        f"{file} must hold a list of objects, or an object in SQuAD's format or with one list of objects; if each line is an object, "
        "name it .jsonl"
    )


def _squad(articles: list[Any], file: Path) -> list[Any]:
    try:
        return [
            {"id": qa["id"], "question": qa["question"], "context": paragraph["context"], "answers": qa["answers"]}
            for article in articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is not quite in SQuAD's format: {type(error).__name__} {error}") from error


def _csv(file: Path) -> Iterator[Row]:
    tabs = kind_of(file) == ".tsv"
    csv.field_size_limit(_LARGEST_CELL)
    with characters(file, newline="") as stream:
        head = stream.readline()
    with characters(file, newline="") as stream:
        # in countries with a decimal comma, spreadsheets part by semicolons
        delimiter = "\t" if tabs else max(",;\t", key=head.count)
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        names: list[str] = []
        count = 0
        try:
            for cells in reader:
                if not cells:
                    continue
                if not names:
                    names = [name.strip() for name in cells]
                    if len(set(names)) < len(names):
                        raise ValueError(
                            f"the first line of {file} must name the columns, each once: {', '.join(names)}"
                        )
                    continue
                count += 1
                place = f"row {count} of {file} (line {reader.line_num})"
                if len(cells) != len(names):
                    raise ValueError(
                        f"{place} has {len(cells)} cells, and the first line names {len(names)} columns; put a text with a "
                        f"{'tab' if delimiter == chr(9) else delimiter!r} or a line end between double quotes"
                    )
                yield Row({name: cell or None for name, cell in zip(names, cells)}, place)
        except csv.Error as error:
            raise ValueError(
                f"row {count + 1} of {file} (line {reader.line_num}) is not valid CSV: {error}; a double quote within a quoted text is "
                "written twice"
            ) from error


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('pyarrow is not installed: pip install "foveate[train]"') from error
    return pyarrow


def _parquet(file: Path) -> Iterator[Row]:
    pyarrow = _pyarrow()
    count = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    count += 1
                    yield Row(fields, f"row {count} of {file}")
    except (
        pyarrow.ArrowException,
        OSError,
    ) as error:  # OSErrors of a damaged header have no number, those of the file system have
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file} is not a Parquet file that pyarrow can read: {error}") from error


def _dataset(folder: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('datasets is not installed: pip install "foveate[train]"') from error
    try:
        data = datasets.load_from_disk(str(folder)).with_format(None)
    except Exception as error:  # of many kinds, from a folder that is not whole
        raise ValueError(f"{folder} is not a data set that the datasets library can read: {error}") from error
    for number, fields in enumerate(data, 1):
        yield Row(fields, f"row {number} of {folder}")


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _text, ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
SUFFIXES = tuple(_READERS)
