"""split: documents into training, validation and test files, by a hash, so that a document never changes sides."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.cleaning import Paths
from foveate.data.corpus import BadRow, Chunk, Corpus, Row
from foveate.data.parts import Part, WorkFolder
from foveate.data.rewrite import Options, Outcome, bar, rewrite
from foveate.data.workers import run

DEFAULT_SHARES = {"train": 0.98, "validation": 0.01, "test": 0.01}


def _number(value: str, seed: int, salt: str) -> int:
    """64 bits of a text, the same everywhere."""
    data = f"{salt}\0{seed}\0{value}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Split:
    """The step: see `split`. extra, under stratify: the target of each row."""

    def __init__(self, field: str, group: str | None, shares: Sequence[float], seed: int, shuffle: bool) -> None:
        self.field, self.group, self.seed, self.shuffle = field, group, seed, shuffle
        self.limits = np.cumsum(np.array(shares, np.float64) / sum(shares))[:-1]

    def name(self, row: Row) -> str:
        """What decides about the side: the group, or the text."""
        if self.group is None:
            return row[self.field]
        if row.get(self.group) is None:
            raise ValueError(
                f"{row.place}: there is no {self.group!r} to group by; the fields are {', '.join(map(repr, row))}"
            )
        return str(row[self.group])

    def __call__(self, rows: Sequence[Row], extra: Any = None) -> list[Outcome]:
        outcomes = []
        for i, row in enumerate(rows):
            share = _number(self.name(row), self.seed, "side") / 2**64
            target = int(np.searchsorted(self.limits, share, side="right")) if extra is None else int(extra[i])
            key = _number(row.place + "\0" + row[self.field], self.seed, "order") if self.shuffle else 0
            outcomes.append(Outcome(dict(row), None, (), (), None, target, key))
        return outcomes


class _Strata:
    """The number of each document's name, and its class."""

    def __init__(self, step: Split, stratify: str, bad_rows: str) -> None:
        self.step, self.stratify, self.bad_rows = step, stratify, bad_rows

    def __call__(self, chunk: Chunk) -> tuple[dict[str, bytes], dict[str, Any]]:
        rows = [
            row
            for row in chunk.read(self.bad_rows)
            if not isinstance(row, BadRow) and isinstance(row.get(self.step.field), str)
        ]
        missing = next((row for row in rows if row.get(self.stratify) is None), None)
        if missing is not None:
            raise ValueError(
                f"{missing.place}: there is no {self.stratify!r} to stratify by; the fields are {', '.join(map(repr, missing))}"
            )
        names = np.array([_number(self.step.name(row), self.step.seed, "side") for row in rows], np.uint64)
        return {"names": names.tobytes()}, {"classes": [str(row[self.stratify]) for row in rows]}


def split(
    paths: Paths,
    output: str | os.PathLike[str],
    *,
    shares: Mapping[str, float] = DEFAULT_SHARES,
    format: str = ".jsonl",
    group: str | None = None,
    stratify: str | None = None,
    shuffle: bool = True,
    seed: int = 0,
    text_field: str = "text",
    documents: str = "pieces",
    **options: Any,
) -> dict[str, Any]:
    """Files in the folder `output`: NAME + format for each of the shares, such as train.jsonl and test.jsonl.

    A document's side follows from a hash of its text and the seed alone: equal texts are on one side, and when data are added or taken
    away no document changes sides. group: a field by whose value documents stay together (a book, an author). stratify: a field whose
    values shall have the same shares on each side: of each value, the documents or groups with the least hashes go to the first
    file, and so on, to the nearest whole number; then a document may change sides when its class grows. A group counts to the class of
    its first document.

    shuffle: each file in the order of a second hash, a permutation of all its documents, which are read from the work folder for it: room
    on the disk for the corpus is needed, and 40 bytes of memory for a document. Without it, in the order of the input.
    """
    if not shares or any(not name or "/" in name or not share > 0 for name, share in shares.items()):
        raise ValueError(f"shares={dict(shares)} must be names of files, each with a share above 0")
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = Options(folder, text_field, documents, outputs=[folder / f"{name}{format}" for name in shares], **options)
    corpus = Corpus(paths, documents)
    step = Split(text_field, group, list(shares.values()), seed, shuffle)
    settings = {"shares": dict(shares), "group": group, "stratify": stratify, "shuffle": shuffle, "seed": seed}
    tasks = functools.partial(_stratified, corpus, chosen, step, stratify) if stratify else None
    return rewrite("split", step, corpus, chosen, settings, tasks, ordered=shuffle)


def _stratified(
    corpus: Corpus, options: Options, step: Split, stratify: str, folder: WorkFolder
) -> Iterator[tuple[Chunk, Any]]:
    parts: list[Part] = []

    def numbered() -> Iterator[tuple[Part, Any, int]]:
        for chunk in corpus.chunks():
            parts.append(folder.part("strata", chunk.number))
            yield parts[-1], chunk, chunk.size

    work = _Strata(step, stratify, options.bad_rows)
    shown = bar("classes", corpus.size, options.shown)
    classes = [s["classes"] for s in run(numbered(), work, workers=options.workers, bar=shown)]
    names = np.concatenate([np.zeros(0, np.uint64), *[np.fromfile(part.file("names"), np.uint64) for part in parts]])
    targets = _targets(names, [name for part in classes for name in part], step.limits)
    ends = np.cumsum([0, *map(len, classes)])
    return ((chunk, targets[ends[chunk.number] : ends[chunk.number + 1]]) for chunk in corpus.chunks())


def _targets(names: np.ndarray, classes: Sequence[str], limits: np.ndarray) -> np.ndarray:
    """int64 [documents]: of each class, shares of its different names, in the order of their numbers."""
    unique, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    class_of = np.array([classes[i] for i in first.tolist()], dtype=object)
    targets = np.zeros(len(unique), np.int64)
    for name in sorted(set(class_of.tolist())):
        members = np.flatnonzero(class_of == name)
        targets[members] = np.searchsorted(np.rint(limits * len(members)), np.arange(len(members)), side="right")
    return targets[inverse]
