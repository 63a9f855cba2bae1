"""dedup: documents or paragraphs that are there more than once, exactly or nearly."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from foveate.data.cleaning import Paths
from foveate.data.corpus import BadRow, Chunk, Corpus, Row
from foveate.data.groups import first_of_equal, first_of_near
from foveate.data.parts import Part, WorkFolder
from foveate.data.rewrite import Options, Outcome, bar, rewrite
from foveate.data.shingles import MinHash, WordHashes, bands_and_rows, shingles, words
from foveate.data.workers import run

UNITS = ("document", "paragraph")
KEEPS = ("first", "longest")
_PARAGRAPHS = re.compile(r"(\n\s*\n|\n)")  # a line is a paragraph: web text has one in each line


def units(text: str, unit: str, min_words: int) -> list[tuple[int, int]]:
    """(start, end) of what is compared: the whole text, or its lines that have at least min_words words."""
    if unit == "document":
        return [(0, len(text))]
    spans, start = [], 0
    for match in [*_PARAGRAPHS.finditer(text), None]:
        end = len(text) if match is None else match.start()
        if len(text[start:end].split(None, min_words)) >= min_words:
            spans.append((start, end))
        start = end if match is None else match.end()
    return spans


class Signatures:
    """What is compared of documents' units, in order: lengths, 128-bit hashes of words, and MinHash signatures if permutations > 0."""

    def __init__(self, field: str, unit: str, min_words: int, ngram: int, permutations: int, seed: int) -> None:
        self.field, self.unit, self.min_words, self.ngram = field, unit, min_words, ngram
        self.permutations, self.seed = permutations, seed

    @functools.cached_property
    def _minhash(self) -> MinHash:
        return MinHash(self.permutations, self.seed)

    @functools.cached_property
    def _hashes(self) -> WordHashes:
        return WordHashes()

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """{"counts": int64 [documents], "lengths": int64 [units], "exact": uint64 [units, 2], "near": uint32 [units, permutations]}"""
        counts, lengths, exact, near = [], [], [], []
        for text in texts:
            spans = units(text, self.unit, self.min_words)
            counts.append(len(spans))
            for start, end in spans:
                unit_words = words(text[start:end])
                joined = " ".join(unit_words) if unit_words else text[start:end].strip()
                exact.append(hashlib.blake2b(joined.encode("utf-8", "replace"), digest_size=16).digest())
                lengths.append(end - start)
                if self.permutations:
                    near.append(self._minhash(shingles(self._hashes(unit_words), self.ngram)))
        return {
            "counts": np.array(counts, np.int64), "lengths": np.array(lengths, np.int64),
            "exact": np.frombuffer(b"".join(exact), np.uint64).reshape(-1, 2),
            "near": np.array(near, np.uint32).reshape(len(lengths), self.permutations),
        }  # fmt: skip


class _Work:
    def __init__(self, signatures: Signatures, bad_rows: str) -> None:
        self.signatures, self.bad_rows = signatures, bad_rows

    def __call__(self, chunk: Chunk) -> tuple[dict[str, bytes], dict[str, Any]]:
        field = self.signatures.field
        rows = [row for row in chunk.read(self.bad_rows) if not isinstance(row, BadRow)]
        rows = [
            row for row in rows if isinstance(row.get(field), str)
        ]  # of the others the second pass says what is wrong
        arrays = self.signatures([row[field] for row in rows])
        files = {f"{name}.bin": values.tobytes() for name, values in arrays.items()}
        files["places"] = "\0".join(row.place for row in rows).encode("utf-8", "replace")
        return files, {"documents": len(rows), "units": len(arrays["lengths"])}


class Remove:
    """The step. extra: (counts of units of each document, first [units]: -1 to keep, else the number of the unit that is kept in its
    place; similarity float32 [units]; and {number of unit: its place})."""

    def __init__(self, field: str, unit: str, min_words: int) -> None:
        self.field, self.unit, self.min_words = field, unit, min_words

    def __call__(self, rows: Sequence[Row], extra: Any = None) -> list[Outcome]:
        counts, kept_unit, similarity, places = extra
        ends = np.cumsum(counts)
        return [
            self._document(row, kept_unit[end - count : end], similarity[end - count : end], places)
            for row, count, end in zip(rows, counts.tolist(), ends.tolist())
        ]

    def _document(self, row: Row, kept_unit: np.ndarray, similarity: np.ndarray, places: dict[int, str]) -> Outcome:
        gone = np.flatnonzero(kept_unit >= 0).tolist()
        if not gone:
            return Outcome(dict(row))
        names = ["duplicate" if similarity[i] < 0 else "near-duplicate" for i in gone]
        if self.unit == "document":
            note: dict[str, Any] = {"kept": places[int(kept_unit[0])]}
            if similarity[0] >= 0:
                note["similarity"] = round(float(similarity[0]), 3)
            return Outcome(None, names[0], (), (), note)
        text: str = row[self.field]
        spans = units(text, self.unit, self.min_words)
        cuts = [(f"{name}-paragraph", text[spans[i][0] : spans[i][1]]) for i, name in zip(gone, names)]
        for i in reversed(gone):
            start, end = spans[i]
            separator = _PARAGRAPHS.match(text, end)
            text = text[:start] + text[separator.end() if separator else end :]
        labels = list(dict.fromkeys(reason for reason, _ in cuts))
        if not text.strip():
            return Outcome(None, "duplicate-paragraphs", labels, cuts)
        return Outcome({**row, self.field: text}, None, labels, cuts)


def dedup(
    paths: Paths,
    output: str | os.PathLike[str],
    *,
    unit: str = "document",
    near: bool = True,
    threshold: float = 0.8,
    ngram: int = 5,
    permutations: int = 128,
    min_words: int = 10,
    keep: str = "first",
    seed: int = 1,
    text_field: str = "text",
    documents: str = "pieces",
    **options: Any,
) -> dict[str, Any]:
    """One document, or paragraph, of each group of equal and nearly equal ones.

    Equal: the same words, whatever their case, punctuation and spaces (BLAKE2b, 128 bits). Nearly equal: the Jaccard similarity of the
    sets of n-grams of words, estimated by MinHash signatures (Broder 1997) of so many permutations, is at least the threshold; pairs are
    found by locality-sensitive hashing, in the bands that suit the threshold (`shingles.bands_and_rows`), and compared by their whole
    signatures. With 128 permutations the estimate has a standard error of 0.035 at 0.8. Groups are connected: a, b and c are one if a is
    like b and b like c.

    unit: "document", or "paragraph", which is a line of at least min_words words; a document whose paragraphs are all gone is removed.
    keep: of a group, the "first" in the order of the input, or the "longest" (the first of those). The result is the same whatever the
    number of workers. Memory: 90 bytes and the signature, of 4 bytes for each permutation, which is memory-mapped.

    The removed file has each document with {"reason": "duplicate" or "near-duplicate", "kept": the place of the one that is kept,
    "similarity": estimated}. Returns counts as `clean` does.
    """
    if unit not in UNITS or keep not in KEEPS:
        raise ValueError(
            f"unit={unit!r} must be one of {', '.join(UNITS)}, and keep={keep!r} one of {', '.join(KEEPS)}"
        )
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1")
    for name, value in (("ngram", ngram), ("permutations", permutations), ("min_words", min_words)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    corpus = Corpus(paths, documents)
    chosen = Options(output, text_field, documents, **options)
    signatures = Signatures(text_field, unit, min_words, ngram, permutations if near else 0, seed)
    settings = {
        "unit": unit, "near": near, "threshold": threshold, "ngram": ngram, "permutations": permutations, "min_words": min_words,
        "keep": keep, "seed": seed,
    }  # fmt: skip
    groups: dict[str, int] = {}

    def tasks(folder: WorkFolder) -> Iterator[tuple[Chunk, Any]]:
        parts, units_of_part = _first_pass(folder, corpus, chosen, _Work(signatures, chosen.bad_rows))
        starts = np.concatenate([[0], np.cumsum(units_of_part)]).astype(np.int64)
        kept_unit, similarity = _read_signatures(parts, signatures, threshold if near else None, keep)
        groups["groups"] = len(np.unique(kept_unit[kept_unit >= 0]))
        places = _places(parts, starts, np.unique(kept_unit[kept_unit >= 0]), unit)

        def chunks() -> Iterator[tuple[Chunk, Any]]:
            for chunk in corpus.chunks():
                start, end = starts[chunk.number], starts[chunk.number + 1]
                part = kept_unit[start:end]
                needed = {n: places[n] for n in np.unique(part[part >= 0]).tolist()} if unit == "document" else {}
                counts = np.fromfile(parts[chunk.number].file("counts.bin"), np.int64)
                yield chunk, (counts, part, similarity[start:end], needed)

        return chunks()

    report = rewrite("dedup", Remove(text_field, unit, min_words), corpus, chosen, settings, tasks)
    return report | groups


def _first_pass(folder: WorkFolder, corpus: Corpus, options: Options, work: _Work) -> tuple[list[Part], list[int]]:
    parts: list[Part] = []

    def numbered() -> Iterator[tuple[Part, Any, int]]:
        for chunk in corpus.chunks():
            parts.append(folder.part("signatures", chunk.number))
            yield parts[-1], chunk, chunk.size

    shown = bar("signatures", corpus.size, options.shown)
    return parts, [summary["units"] for summary in run(numbered(), work, workers=options.workers, bar=shown)]


def _read_signatures(
    parts: Sequence[Part], signatures: Signatures, threshold: float | None, keep: str
) -> tuple[np.ndarray, np.ndarray]:
    def column(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *[np.fromfile(part.file(f"{name}.bin"), dtype) for part in parts]])

    near = None if threshold is None else column("near", np.uint32).reshape(-1, signatures.permutations)
    exact = column("exact", np.uint64).reshape(-1, 2)
    return decide(column("lengths", np.int64), exact, near, threshold=threshold or 1.0, keep=keep)


def decide(
    lengths: np.ndarray, exact: np.ndarray, near: np.ndarray | None, *, threshold: float, keep: str
) -> tuple[np.ndarray, np.ndarray]:
    """(kept_unit int64 [units]: -1 to keep, else the unit that is kept in its place; similarity float32 [units]: to that one, -1 for an
    equal one). The arguments are those of `Signatures`, of all units; near is None for equal ones alone."""
    count = np.arange(len(lengths))
    rank = count if keep == "first" else np.lexsort((count, -lengths)).argsort()
    kept_unit = first_of_equal(exact, rank)
    similarity = np.full(len(lengths), -1, np.float32)
    if near is not None and len(lengths):
        bands, rows = bands_and_rows(threshold, near.shape[1])
        first_of_near(near, kept_unit, similarity, rank, threshold=threshold, bands=bands, rows=rows)
    return kept_unit, similarity


def _places(parts: Sequence[Part], starts: np.ndarray, numbers: np.ndarray, unit: str) -> dict[int, str]:
    if unit == "paragraph":
        return {}
    places: dict[int, str] = {}
    which = np.searchsorted(starts, numbers, side="right") - 1
    for part in np.unique(which).tolist():
        lines = parts[part].file("places").read_text(errors="replace").split("\0")
        for number in numbers[which == part].tolist():
            places[number] = lines[number - int(starts[part])]
    return places
