"""Texts for the tests of foveate.data: prose of our own making, from a seed, in every format, with what each step is about put into it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

_STARTS = (
    "mil",
    "ship",
    "far",
    "wood",
    "lam",
    "ston",
    "har",
    "vil",
    "riv",
    "clo",
    "ban",
    "tem",
    "gar",
    "pol",
    "sun",
    "wen",
)
_MIDDLES = ("", "er", "an", "o", "is", "ul", "et", "ar")
_ENDINGS = ("ing", "ed", "ers", "ly", "ness", "land", "side", "ton", "ways", "mer")
_SMALL = ("the", "of", "and", "to", "with", "that", "in", "a")


def sentence(rng: random.Random) -> str:
    """18 words, every third one small; the others are of our own making, 1280 of them."""
    made = [
        rng.choice(_SMALL) if i % 3 == 1 else rng.choice(_STARTS) + rng.choice(_MIDDLES) + rng.choice(_ENDINGS)
        for i in range(18)
    ]
    return " ".join(made).capitalize() + "."


def prose(seed: int, sentences: int = 12) -> str:
    """Paragraphs that keep all rules: about 18 words a sentence, three sentences a paragraph."""
    rng = random.Random(seed)
    made = [sentence(rng) for _ in range(sentences)]
    return "\n".join(" ".join(made[i : i + 3]) for i in range(0, sentences, 3))


def documents(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [{"id": i, "text": prose(seed * 100_003 + i)} for i in range(count)]


def write(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """By its suffix: .jsonl, .json, .csv, .parquet, .txt (documents parted by empty lines), perhaps with .gz."""
    rows = list(rows)
    name = file.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
        return file
    data = _bytes(name, rows)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def _bytes(name: str, rows: Sequence[dict[str, Any]]) -> bytes:
    if name.endswith(".txt"):
        return "\n\n".join(row["text"] for row in rows).encode()
    if name.endswith(".json"):
        return json.dumps(rows).encode()
    if name.endswith(".csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def read(file: Path) -> list[dict[str, Any]]:
    from foveate.files.readers import rows_of

    return [dict(row) for row in rows_of(Path(file))] if file.stat().st_size else []
