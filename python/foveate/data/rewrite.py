"""What the commands that write documents have in common: a step over chunks on all cores, what it keeps, what it removes, a report."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from foveate.data.corpus import CONTINUES, BadRow, Chunk, Corpus, Row, text_of
from foveate.data.parts import Blobs, Part, WorkFolder, remove
from foveate.data.report import write_report
from foveate.data.workers import run
from foveate.data.writers import Format, json_bytes
from foveate.progress import ProgressBar

SAMPLES = 4  # of each label, in the report
_SHOWN = 1200  # characters of a sample
BAD_ROWS = ("stop", "remove")


class Outcome(NamedTuple):
    """What a step makes of a document.

    row: what is kept, or None with the reason. labels: what was done to it, each counted. cuts: what was taken out of its text, as
    (reason, text). note: fields for the record of a removed document, or of each cut of a kept one. target: which of the outputs it goes
    to. key: its place in an output that is ordered by keys.
    """

    row: dict[str, Any] | None
    reason: str | None = None
    labels: Sequence[str] = ()
    cuts: Sequence[tuple[str, str]] = ()
    note: dict[str, Any] | None = None
    target: int = 0
    key: int = 0


class Step(Protocol):
    """A function of rows, the same in every process. field: the name of the text. extra: what the run knows of this chunk beforehand."""

    field: str

    def __call__(self, rows: Sequence[Row], extra: Any = None) -> list[Outcome]: ...


@dataclass
class Options:
    """What every command that writes takes; the functions of `foveate.data` explain them."""

    output: str | os.PathLike[str]
    text_field: str = "text"
    documents: str = "pieces"
    removed: str | os.PathLike[str] | None = None
    report: str | os.PathLike[str] | None = None
    workers: int | None = None
    bad_rows: str = "stop"
    restart: bool = False
    overwrite: bool = False
    progress: bool | None = None
    outputs: list[Path] = field(default_factory=list)  # where there are several; else output alone

    def __post_init__(self) -> None:
        if self.bad_rows not in BAD_ROWS:
            raise ValueError(f"bad_rows={self.bad_rows!r} must be one of {', '.join(BAD_ROWS)}")
        self.output = Path(self.output).expanduser()
        self.outputs = self.outputs or [self.output]

    @property
    def removed_file(self) -> Path:
        """clean.removed.jsonl.gz beside clean.jsonl.gz, unless it is named."""
        if self.removed is not None:
            file = Path(self.removed).expanduser()
            if Format.of(file).kind not in (".jsonl", ".ndjson"):
                raise ValueError(
                    f"the file of what is removed, {file}, has to be .jsonl, perhaps compressed: rows differ in their fields"
                )
            return file
        file = self.outputs[0] if len(self.outputs) == 1 else Path(self.output) / "all.jsonl"
        form = Format.of(file)
        stem = file.name[: file.name.lower().rindex(form.kind)]
        return file.with_name(f"{stem}.removed.jsonl{form.compression or ''}")

    @property
    def shown(self) -> bool:
        return sys.stderr.isatty() if self.progress is None else self.progress


def bar(description: str, total: float, shown: bool) -> ProgressBar:
    return ProgressBar(f"{description}:", "bar", "bytes", "speed", "remaining", total=total, shown=shown)


@dataclass
class _Work:
    """The work on one chunk, in a worker."""

    step: Step
    formats: list[Format]
    removed: Format
    ordered: bool  # by keys
    lines: bool
    bad_rows: str

    def __call__(self, task: tuple[Chunk, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
        chunk, extra = task
        read = chunk.read(self.bad_rows)
        rows: list[Row] = []
        records: list[dict[str, Any]] = []
        tally = Tally()
        for row in read:
            if isinstance(row, BadRow):
                records.append(tally.bad(row.place, row.error, {"text": row.shown}))
                continue
            try:
                text_of(row, self.step.field)
            except ValueError as error:
                if self.bad_rows != "remove":
                    raise
                records.append(tally.bad(row.place, str(error), {"row": dict(row)}))
                continue
            rows.append(row)
        kept: list[list[dict[str, Any]]] = [[] for _ in self.formats]
        keys: list[list[int]] = [[] for _ in self.formats]
        for row, outcome in zip(rows, self.step(rows, extra)):
            records += tally.add(row, outcome, self.step.field)
            if outcome.row is not None:
                kept[outcome.target].append(outcome.row)
                keys[outcome.target].append(outcome.key)
        files = {"removed": self.removed.compress(data) if (data := b"".join(map(json_bytes, records))) else b""}
        for i, form in enumerate(self.formats):
            if self.ordered or form.needs_all_rows:
                encoded = Blobs.encode(kept[i], np.array(keys[i], np.uint64))
                files |= {f"{i}.{name}": data for name, data in encoded.items()}
            else:
                files[f"{i}.kept"] = form.encode(kept[i], self.step.field, self.lines)
        return files, tally.summary() | {"kept": [len(rows) for rows in kept]}


class Tally:
    """Counts and samples of documents, and the records of what is removed. Sums of several are the same whatever the chunks were."""

    def __init__(self) -> None:
        self.documents = self.bytes_in = self.bytes_out = self.changed = 0
        self.reasons: Counter[str] = Counter()
        self.labels: Counter[str] = Counter()
        self.samples: dict[str, list[dict[str, Any]]] = {}

    def bad(self, place: str, error: str, fields: dict[str, Any]) -> dict[str, Any]:
        self.documents += 1
        self.reasons["bad-row"] += 1
        self._sample("bad-row", place, next((v for v in fields.values() if isinstance(v, str)), ""), None)
        return {"reason": "bad-row", "place": place, "error": error, **fields}

    def add(self, row: Row, outcome: Outcome, text_field: str) -> list[dict[str, Any]]:
        before: str = row[text_field]
        after: str | None = None if outcome.row is None else outcome.row[text_field]
        self.documents += 1
        self.bytes_in += len(before.encode("utf-8", "replace"))
        self.labels.update(outcome.labels)
        note = (outcome.note or {}) if after is not None else {}
        records = [{"reason": reason, "place": row.place, **note, "text": text} for reason, text in outcome.cuts]
        if after is None:
            reason = str(outcome.reason)
            self.reasons[reason] += 1
            self._sample(reason, row.place, before, None)
            fields = {name: value for name, value in row.items() if name != CONTINUES}
            return [*records, {"reason": reason, "place": row.place, **(outcome.note or {}), "row": fields}]
        self.bytes_out += len(after.encode("utf-8", "replace"))
        if after != before:
            self.changed += 1
            for label in outcome.labels or ("changed",):
                self._sample(label, row.place, before, after)
        return records

    def _sample(self, label: str, place: str, before: str, after: str | None) -> None:
        key = hashlib.blake2b(place.encode("utf-8", "replace"), digest_size=8).hexdigest()
        samples = self.samples.setdefault(label, [])
        if len(samples) < SAMPLES or key < samples[-1]["key"]:
            cut = 0 if after is None else max(0, _first_difference(before, after) - 200)
            sample = {"key": key, "place": place, "before": before[cut : cut + _SHOWN], "cut": cut}
            sample["after"] = None if after is None else after[cut : cut + _SHOWN]
            self.samples[label] = sorted([*samples, sample], key=lambda s: (s["key"], s["place"]))[:SAMPLES]

    def summary(self) -> dict[str, Any]:
        return {
            "documents": self.documents, "bytes_in": self.bytes_in, "bytes_out": self.bytes_out, "changed": self.changed,
            "reasons": dict(self.reasons), "labels": dict(self.labels), "samples": self.samples,
        }  # fmt: skip

    def merge(self, part: dict[str, Any]) -> None:
        self.documents += part["documents"]
        self.bytes_in += part["bytes_in"]
        self.bytes_out += part["bytes_out"]
        self.changed += part["changed"]
        self.reasons.update(part["reasons"])
        self.labels.update(part["labels"])
        for label, samples in part["samples"].items():
            both = [*self.samples.get(label, []), *samples]
            self.samples[label] = sorted(both, key=lambda s: (s["key"], s["place"]))[:SAMPLES]


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


Tasks = Callable[[WorkFolder], Iterator[tuple[Chunk, Any]]]


def rewrite(
    command: str,
    step: Step,
    corpus: Corpus,
    options: Options,
    settings: dict[str, Any],
    tasks: Tasks | None = None,
    ordered: bool = False,
) -> dict[str, Any]:
    """Every document through the step: the outputs, the file of what is removed, the report, and what the command returns.

    settings: the options that decide about the bytes, for `WorkFolder`. tasks: chunks with what the step is told of each; by default
    nothing. ordered: outputs sorted by Outcome.key.
    """
    start = time.monotonic()
    formats = [Format.of(file) for file in options.outputs]
    removed_file = options.removed_file
    removed_format = Format.of(removed_file)
    plan = {
        "command": command,
        "files": corpus.signature(),
        "options": settings | {"text_field": options.text_field, "bad_rows": options.bad_rows},
    }
    plan["outputs"] = [str(file.resolve()) for file in [*options.outputs, removed_file]]
    others = [*options.outputs[1:], removed_file]
    first = options.outputs[0]
    first.parent.mkdir(parents=True, exist_ok=True)
    removed_file.parent.mkdir(parents=True, exist_ok=True)
    lines = corpus.documents == "lines"
    work = _Work(step, formats, removed_format, ordered, lines, options.bad_rows)
    kept = np.zeros(len(formats), np.int64)
    tally = Tally()
    with WorkFolder(first, others, plan, restart=options.restart, overwrite=options.overwrite) as folder:
        parts: list[Part] = []

        # called here, so that a first pass has ended before the second begins
        items = tasks(folder) if tasks else ((chunk, None) for chunk in corpus.chunks())

        def numbered() -> Iterator[tuple[Part, Any, int]]:
            for chunk, extra in items:
                parts.append(folder.part("rows", chunk.number))
                yield parts[-1], (chunk, extra), chunk.size

        for summary in run(numbered(), work, workers=options.workers, bar=bar(command, corpus.size, options.shown)):
            tally.merge(summary)
            kept += summary["kept"]
        for i, (file, form) in enumerate(zip(options.outputs, formats)):
            finish(file, form, parts, str(i), ordered=ordered, field=step.field, lines=lines)
        concatenate(removed_file, removed_format, [part.file("removed") for part in parts])
        resumed = folder.resumed
    report = tally.summary()
    samples = report.pop("samples")
    report |= {
        "kept": int(kept.sum()), "removed": tally.documents - int(kept.sum()), "seconds": round(time.monotonic() - start, 3),
        "resumed": resumed, "output": str(first), "removed_file": str(removed_file),
    }  # fmt: skip
    if len(formats) > 1:
        report["outputs"] = {str(file): int(count) for file, count in zip(options.outputs, kept)}
    if options.report is not None:
        write_report(Path(options.report).expanduser(), command, report, samples, settings)
        report["report"] = str(options.report)
    return report


def finish(
    file: Path, form: Format, parts: Sequence[Part], name: str, *, ordered: bool, field: str, lines: bool
) -> None:
    if not (ordered or form.needs_all_rows):
        concatenate(file, form, [part.file(f"{name}.kept") for part in parts])
        return
    blobs = Blobs(parts, name, in_order_of_keys=ordered)
    beside = file.with_name(f"{file.name}.tmp")
    try:
        if form.needs_all_rows:
            form.write_table(beside, blobs.batches)
        else:
            with beside.open("wb") as out:
                for rows in blobs.batches():
                    out.write(form.encode(rows, field, lines))
                if not out.tell():
                    out.write(form.compress(b""))
    except BaseException:
        remove(beside)
        raise
    beside.replace(file)


def concatenate(file: Path, form: Format, sources: Sequence[Path]) -> None:
    beside = file.with_name(f"{file.name}.tmp")
    with beside.open("wb") as out:
        for source in sources:
            with source.open("rb") as stream:
                shutil.copyfileobj(stream, out, 2**20)
        if not out.tell():
            out.write(form.compress(b""))
    beside.replace(file)
