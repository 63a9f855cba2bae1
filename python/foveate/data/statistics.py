"""stats: what is in the files, without writing any."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.cleaning import Paths
from foveate.data.corpus import BadRow, Chunk, Corpus
from foveate.data.parts import Part
from foveate.data.rewrite import BAD_ROWS, bar
from foveate.data.tokens import read_tokenizer
from foveate.data.workers import run

_STEPS = 64  # lengths are counted in 64 steps between one power of two and the next
_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class _Count:
    """The statistics of a chunk, in a worker: sums, a histogram of lengths, hashes of the texts."""

    def __init__(self, field: str, bad_rows: str, tokenizer: str | None, languages: bool) -> None:
        self.field, self.bad_rows, self.tokenizer, self.languages = field, bad_rows, tokenizer, languages
        self._backend: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_backend": None}

    def __call__(self, chunk: Chunk) -> tuple[dict[str, bytes], dict[str, Any]]:
        if self.tokenizer and self._backend is None:
            self._backend = read_tokenizer(self.tokenizer)
        sums: Counter[str] = Counter()
        fields: Counter[str] = Counter()
        languages: Counter[str] = Counter()
        lengths: Counter[int] = Counter()
        hashes = []
        texts = []
        for row in chunk.read(self.bad_rows):
            text = None if isinstance(row, BadRow) else row.get(self.field)
            if isinstance(row, BadRow) or not isinstance(text, str):
                sums["rows without text"] += 1
                continue
            fields.update(name for name, value in row.items() if value is not None and not name.startswith("\0"))
            data = text.encode("utf-8", "replace")
            sums["documents"] += 1
            sums["bytes"] += len(data)
            sums["characters"] += len(text)
            sums["words"] += len(text.split())
            sums["lines"] += text.count("\n") + (not text.endswith("\n"))
            sums["empty"] += not text.strip()
            sums["ascii"] += text.isascii()
            lengths[_step(len(text))] += 1
            hashes.append(hashlib.blake2b(data, digest_size=8).digest())
            texts.append(text)
        if self._backend is not None:
            sums["tokens"] += sum(len(e.ids) for e in self._backend.encode_batch(texts, add_special_tokens=False))
        if self.languages:
            from foveate.data.languages import identify

            languages.update(identify(text)[0] for text in texts)
        lengths_of = {str(step): count for step, count in lengths.items()}
        summary = {"sums": dict(sums), "fields": dict(fields), "languages": dict(languages), "lengths": lengths_of}
        return {"hashes": b"".join(hashes)}, summary


def _step(length: int) -> int:
    return 0 if length == 0 else 1 + int(np.log2(length) * _STEPS)


def _length(step: int) -> int:
    """About, to 1 %."""
    return 0 if step == 0 else round(2 ** ((step - 0.5) / _STEPS))


def stats(
    paths: Paths,
    *,
    tokenizer: str | None = None,
    languages: bool = False,
    text_field: str = "text",
    documents: str = "pieces",
    bad_rows: str = "stop",
    workers: int | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Counts of the documents in files: {"files", "bytes_on_disk", "documents", "bytes", "characters", "words", "lines", "empty", "ascii",
    "duplicates", "fields": {name: documents that have it}, "lengths": {quantile: characters, to 1 %}, "seconds"}.

    bytes: of the text in UTF-8. duplicates: documents whose text was there before, byte for byte (64-bit hashes, 8 bytes of memory each).
    tokenizer: a folder or tokenizer.json; then also "tokens" and "bytes_per_token". languages: also {"languages": {code: documents}}, by
    `languages.identify`. "rows without text" is there under bad_rows="remove", which counts such rows; "stop" raises.
    """
    if bad_rows not in BAD_ROWS:
        raise ValueError(f"bad_rows={bad_rows!r} must be one of {', '.join(BAD_ROWS)}")
    start = time.monotonic()
    corpus = Corpus(paths, documents)
    work = _Count(text_field, bad_rows, tokenizer, languages)
    if tokenizer:
        read_tokenizer(tokenizer)  # what is wrong with it is said here
    sums: Counter[str] = Counter()
    counted: dict[str, Counter[str]] = {"fields": Counter(), "languages": Counter(), "lengths": Counter()}
    parts: list[Part] = []
    with tempfile.TemporaryDirectory(prefix="foveate-stats-") as folder:

        def tasks() -> Iterator[tuple[Part, Any, int]]:
            for chunk in corpus.chunks():
                parts.append(Part(Path(folder), chunk.number))
                yield parts[-1], chunk, chunk.size

        shown = bar("stats", corpus.size, sys.stderr.isatty() if progress is None else progress)
        for summary in run(tasks(), work, workers=workers, bar=shown):
            sums.update(summary["sums"])
            for name, counts in counted.items():
                counts.update(summary[name])
        hashes = np.concatenate(
            [np.zeros(0, np.uint64), *[np.fromfile(part.file("hashes"), np.uint64) for part in parts]]
        )
    if sums["rows without text"] and bad_rows == "stop":
        _raise_first(corpus, text_field)
    names = ("documents", "bytes", "characters", "words", "lines", "empty", "ascii", *(["tokens"] if tokenizer else []))
    result: dict[str, Any] = {
        "files": len(corpus.files),
        "bytes_on_disk": corpus.size,
        **{name: sums[name] for name in names},
    }
    result["duplicates"] = len(hashes) - len(np.unique(hashes))
    if tokenizer:
        result["bytes_per_token"] = round(sums["bytes"] / max(1, sums["tokens"]), 4)
    if sums["rows without text"]:
        result["rows without text"] = sums["rows without text"]
    result["fields"] = dict(counted["fields"].most_common())
    if languages:
        result["languages"] = dict(counted["languages"].most_common())
    result["lengths"] = _quantiles({int(step): count for step, count in counted["lengths"].items()})
    return result | {"seconds": round(time.monotonic() - start, 3)}


def _raise_first(corpus: Corpus, field: str) -> None:
    from foveate.data.corpus import text_of

    for row in corpus.rows():
        text_of(row, field)


def _quantiles(histogram: dict[int, int]) -> dict[str, int]:
    total = sum(histogram.values())
    lengths: dict[str, int] = {}
    for quantile in _QUANTILES if total else ():
        left = quantile * (total - 1)
        for step in sorted(histogram):
            left -= histogram[step]
            if left < 0:
                lengths[f"{quantile:.0%}"] = _length(step)
                break
    return lengths
