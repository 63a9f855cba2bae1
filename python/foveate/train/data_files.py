"""Rows of data files, one after the other: text, JSONL, JSON, Parquet, folders of the datasets library. Only .json is read whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PIECE = 2**16  # characters of a text file that make a document, if a line ends there
LONGEST_PIECE = 2**18
# A field of the pieces of a file but the last one; no column of a user's has such a name.
CONTINUES = "\0continues"
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
_ENCODING = "utf-8-sig"  # UTF-8, with or without the mark that some editors write first


def read_rows(paths: Sequence[str]) -> Iterator[Row]:
    """Rows as dictionaries, {"text": ...} for text files.

    A text file is cut into documents of about 64 thousand characters, before a line that does not begin with white space (at 256
    thousand anywhere), all but the last one with CONTINUES. JSON: a list of objects, or SQuAD's format, which gives {"id", "question",
    "context", "answers": [{"text", "answer_start"}]}.
    FileNotFoundError and ValueError with the place of what cannot be read.
    """
    for path in paths:
        for file in data_files(path):
            if file.is_dir():
                yield from _dataset(file)
            else:
                yield from _READERS[file.suffix](file)


def strings(value: Any) -> Iterator[str]:
    """Every text in a row, whatever its fields are."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def data_files(path: str) -> list[Path]:
    """The files that `path` stands for, or the folder itself if the datasets library wrote it."""
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"the data {path} does not exist")
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise ValueError(f"{path} is of no known kind; data files end in {', '.join(SUFFIXES)}")
        return [place]
    if (place / "dataset_dict.json").exists():
        splits = json.loads((place / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{path} holds several data sets, {', '.join(splits)}; name one of them: {place / splits[0]}")
    if (place / "dataset_info.json").exists():
        return [place]
    files = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"the folder {path} has no data: no file in it ends in {', '.join(SUFFIXES)}")
    return files


def _text(file: Path) -> Iterator[Row]:
    with file.open(encoding=_ENCODING) as stream:
        piece = ""
        try:
            while line := stream.readline(PIECE):
                # not before white space, to which a tokenizer may join the line end; but a piece ends some time
                if len(piece) >= PIECE and (not line[0].isspace() or len(piece) >= LONGEST_PIECE):
                    yield {"text": piece, CONTINUES: True}
                    piece = ""
                piece += line
        except UnicodeDecodeError as error:
            raise _no_utf8(file, error) from error
    if piece:
        yield {"text": piece}


def _lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode(_ENCODING))
            except UnicodeDecodeError as error:
                raise _no_utf8(f"line {number} of {file}", error) from error
            except ValueError as error:
                raise ValueError(f"line {number} of {file} is not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {file} must be a JSON object, not a {type(row).__name__}")
            yield row


def _json(file: Path) -> Iterator[Row]:
    try:
        value = json.loads(file.read_text(encoding=_ENCODING))
    except UnicodeDecodeError as error:
        raise _no_utf8(file, error) from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        yield from value
        return
    try:
        questions = [
            {"id": qa["id"], "question": qa["question"], "context": paragraph["context"], "answers": qa["answers"]}
            for article in value["data"]
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} must hold a list of objects, or an object in SQuAD's format") from error
    yield from questions


def _no_utf8(place: Path | str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{place} is not UTF-8 text: {error}; convert it, for instance with iconv")


def _parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('pyarrow is not installed: pip install "foveate[train]"') from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is not a Parquet file that pyarrow can read: {error}") from error


def _dataset(folder: Path) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('datasets is not installed: pip install "foveate[train]"') from error
    yield from datasets.load_from_disk(str(folder))


_READERS = {".txt": _text, ".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".parquet": _parquet}
