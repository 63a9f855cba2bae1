"""Rows as the bytes of an output file: text, JSON lines, CSV, TSV, Parquet, compressed or not."""

from __future__ import annotations

import bz2
import csv
import datetime
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foveate.files.data_files import CONTINUES

Fields = Mapping[str, Any]
_BATCH = 8192  # rows of a Parquet row group
_TABLES = (".csv", ".tsv", ".parquet")


def _zstd(data: bytes) -> bytes:
    return pyarrow().compress(data, codec="zstd", asbytes=True)


_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, 6, mtime=0), ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd,
}  # fmt: skip


def pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError('Parquet and .zst files need pyarrow: pip install "foveate[data]"') from error
    return pyarrow


class Format(NamedTuple):
    """The format of an output file. Compressed parts that follow one another are one file, in each of the compressions."""

    kind: str
    compression: str | None

    @classmethod
    def of(cls, file: Path) -> Format:
        """By the name, such as clean.jsonl.zst. ValueError for one that says nothing."""
        name, compression = file.name.lower(), None
        for suffix in _COMPRESS:
            if name.endswith(suffix):
                name, compression = name.removesuffix(suffix), suffix
        kind = Path(name).suffix
        if kind not in (".txt", ".jsonl", ".ndjson", *_TABLES) or (kind == ".parquet" and compression):
            raise ValueError(
                f"{file}: an output ends in .jsonl, .txt, .csv, .tsv or .parquet; all but the last one may be followed by "
                f"{', '.join(_COMPRESS)}"
            )
        if kind == ".parquet" or compression == ".zst":
            pyarrow()
        return cls(kind, compression)

    @property
    def needs_all_rows(self) -> bool:
        """Whether the columns have to be known before the first byte."""
        return self.kind in _TABLES

    def encode(self, rows: Iterable[Fields], field: str, lines: bool) -> bytes:
        """The bytes of rows in a format that needs no columns; empty for no rows.

        field: what a text file holds of a row. lines: a document in each line.
        """
        if self.kind == ".txt":
            data = "".join(_line(row[field]) if lines else _document(row, field) for row in rows).encode()
        else:
            data = b"".join(json_bytes(row) for row in rows)
        return self.compress(data) if data else b""

    def compress(self, data: bytes) -> bytes:
        return _COMPRESS[self.compression](data) if self.compression else data

    def write_table(self, file: Path, batches: Callable[[], Iterator[list[dict[str, Any]]]]) -> None:
        """Writes a file in a format that needs all columns. batches: a new iterator over the rows, at each call."""
        if self.kind == ".parquet":
            _write_parquet(file, batches)
            return
        names = list(dict.fromkeys(name for rows in batches() for row in rows for name in row if name != CONTINUES))
        with file.open("wb") as stream:
            stream.write(self.compress(self._cells([names])))
            for rows in batches():
                stream.write(self.compress(self._cells([row.get(name) for name in names] for row in rows)))

    def _cells(self, rows: Iterable[Sequence[Any]]) -> bytes:
        out = io.StringIO()
        writer = csv.writer(out, delimiter="\t" if self.kind == ".tsv" else ",", lineterminator="\n")
        for cells in rows:
            writer.writerow([_cell(cell) for cell in cells])
        return out.getvalue().encode()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=_json_value) if isinstance(value, (dict, list)) else value


def _document(row: Fields, field: str) -> str:
    """A text and the empty line that ends it; a piece of a longer text as it is."""
    text = row[field]
    if CONTINUES in row:
        return text if text.endswith("\n") else f"{text}\n"
    return text.rstrip("\n") + "\n\n" if text.strip() else ""


def _line(text: str) -> str:
    if "\n" in text:
        raise ValueError(
            f"a document has a line end in it, {text[:40]!r}; a .txt of lines cannot hold it: write a .jsonl file"
        )
    return f"{text}\n"


def json_bytes(row: Fields) -> bytes:
    """A line."""
    fields = {name: value for name, value in row.items() if name != CONTINUES}
    return json.dumps(fields, ensure_ascii=False, default=_json_value).encode() + b"\n"


def _json_value(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.datetime, datetime.time)):
        return value.isoformat()
    raise ValueError(f"a field holds a {type(value).__name__}, which JSON cannot; write a .parquet file")


def _write_parquet(file: Path, batches: Callable[[], Iterator[list[dict[str, Any]]]]) -> None:
    arrow = pyarrow()
    try:
        schemas = [_table(rows).schema for rows in batches()]
        schema = arrow.unify_schemas(schemas, promote_options="permissive") if schemas else arrow.schema([])
        with arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            for rows in batches():
                for i in range(0, len(rows), _BATCH):
                    table = arrow.concat_tables(
                        [schema.empty_table(), _table(rows[i : i + _BATCH])], promote_options="permissive"
                    )
                    writer.write_table(table.select(schema.names).cast(schema))
    except arrow.ArrowException as error:
        raise ValueError(f"{file.name}: the rows do not fit one Parquet table, {error}; write a .jsonl file") from error


def _table(rows: Sequence[Fields]) -> Any:
    names = dict.fromkeys(name for row in rows for name in row if name != CONTINUES)
    return pyarrow().table({name: [row.get(name) for row in rows] for name in names})
