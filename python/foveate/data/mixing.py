"""mix: several sources in given proportions, drawn document by document."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.corpus import Corpus, Row, text_of
from foveate.data.parts import Blobs, Part, WorkFolder
from foveate.data.rewrite import Options, bar, finish
from foveate.data.writers import Format

_PART = 4096  # documents


class Mixture:
    """The order in which documents are drawn from sources: which source, at each position, follows from the seed alone.

    counts: documents of each source. weights: shares of the draws. A source that has been read max_repeats times is left out from then
    on, and the others share its draws.
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float], *, seed: int, max_repeats: float, total: int | None
    ) -> None:
        self.counts, self.weights, self.seed = list(counts), np.array(weights, np.float64), seed
        self.limits = [int(count * max_repeats) for count in counts]
        most = sum(limit for limit, weight in zip(self.limits, weights) if weight > 0)
        if total is not None and total > most:
            raise ValueError(
                f"total={total:,} documents are wanted, and the sources have {most:,} with max_repeats={max_repeats:g}; raise max_repeats, "
                "or take fewer"
            )
        self.total = self._first_to_end() if total is None else total

    def _first_to_end(self) -> int:
        """Until the first source is used up: the mixture is as wanted to its end."""
        drawn = np.zeros(len(self.counts), np.int64)
        for position, source in enumerate(self._draws()):
            drawn[source] += 1
            if drawn[source] >= self.limits[source]:
                return position + 1
        return 0

    def _draws(self) -> Iterator[int]:
        drawn = [0] * len(self.counts)
        open_weights = np.where(np.array(self.limits) > 0, self.weights, 0)
        rng = np.random.Generator(np.random.Philox(self.seed))
        while open_weights.sum() > 0:
            edges = np.cumsum(open_weights) / open_weights.sum()
            for value in rng.random(1024).tolist():
                source = int(np.searchsorted(edges, value, side="right"))
                if drawn[source] >= self.limits[source]:
                    continue  # used up within these 1024 draws
                drawn[source] += 1
                yield source
            open_weights = np.where(np.array(drawn) < self.limits, open_weights, 0)

    def __iter__(self) -> Iterator[int]:
        """The number of the source, at each of `total` positions."""
        for position, source in enumerate(self._draws()):
            if position >= self.total:
                return
            yield source


def interleave(sources: Sequence[Corpus], mixture: Mixture, start: int = 0) -> Iterator[tuple[int, Row]]:
    """(source, row) from position `start` on: what an iteration from the beginning gives there. A source is read in its order, and
    again from its beginning."""
    readers: dict[int, Iterator[Row]] = {}
    position = 0
    skip = [0] * len(sources)
    for source in mixture:
        if position < start:
            skip[source] += 1
            position += 1
            continue
        if source not in readers:
            readers[source] = sources[source].rows()
            for _ in range(skip[source] % mixture.counts[source]):
                next(readers[source])
        row = next(readers[source], None)
        if row is None:
            readers[source] = sources[source].rows()
            row = next(readers[source])
        yield source, row


def mix(
    sources: Mapping[str, float | None] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    temperature: float = 1.0,
    max_repeats: float = 1.0,
    total: int | None = None,
    seed: int = 0,
    text_field: str = "text",
    documents: str = "pieces",
    source_field: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Documents of several sources, drawn one after the other in given proportions.

    sources: {path: weight}; a weight of None, or a list of paths, weighs a source by its number of documents. temperature T: each share
    becomes proportional to share^(1/T): 1 leaves the weights, higher values bring them nearer to each other (Xue et al. 2021, "mT5", has
    exponents of 0.3, which is T = 3.3). max_repeats: how often a source may be read, 4 being harmless for pre-training (Muennighoff et
    al. 2023, "Scaling Data-Constrained Language Models"). total: how many documents; by default until the first source is used up, after
    which the proportions would no longer hold. source_field: a field that says which source a document is of.

    The order follows from the seed alone; a source is read in its own order (`split` shuffles). Returns {"documents", "seconds",
    "output", "sources": {path: {"documents", "drawn", "repeats", "weight"}}}.
    """
    start = time.monotonic()
    weights = dict(sources) if isinstance(sources, Mapping) else {os.fspath(path): None for path in sources}
    if not weights or any(weight is not None and not weight >= 0 for weight in weights.values()):
        raise ValueError(f"the weights {weights} must be 0 or more, of at least one source")
    if temperature <= 0 or max_repeats <= 0:
        raise ValueError(f"temperature={temperature} and max_repeats={max_repeats} must be above 0")
    chosen = Options(output, text_field, documents, **options)
    if chosen.removed is not None or chosen.report is not None:
        raise ValueError("mix removes and changes nothing: there is no removed file and no report")
    corpora = [Corpus(path, documents) for path in weights]
    counts = [_count(corpus, text_field) for corpus in corpora]
    for path, count in zip(weights, counts):
        if not count:
            raise ValueError(f"the source {path} has no documents; leave it out")
    shares = np.array(
        [count if weight is None else weight for weight, count in zip(weights.values(), counts)], np.float64
    )
    if not shares.sum() > 0:
        raise ValueError(f"the weights {weights} are all 0")
    shares = np.where(shares > 0, (shares / shares.sum()) ** (1 / temperature), 0)
    shares /= shares.sum()
    mixture = Mixture(counts, shares.tolist(), seed=seed, max_repeats=max_repeats, total=total)
    plan = {
        "command": "mix", "files": [corpus.signature() for corpus in corpora], "output": str(Path(output).resolve()),
        "options": {"weights": weights, "temperature": temperature, "max_repeats": max_repeats, "total": total, "seed": seed,
                    "text_field": text_field, "source_field": source_field},
    }  # fmt: skip
    drawn = _write(chosen, corpora, mixture, plan, source_field, list(weights))
    used = {
        path: {
            "documents": count,
            "drawn": number,
            "repeats": round(number / count, 3),
            "weight": round(float(share), 6),
        }
        for path, count, number, share in zip(weights, counts, drawn, shares)
    }
    seconds = round(time.monotonic() - start, 3)
    return {"documents": sum(drawn), "seconds": seconds, "output": str(output), "sources": used}


def _count(corpus: Corpus, field: str) -> int:
    count = 0
    for row in corpus.rows():
        text_of(row, field)
        count += 1
    return count


def _write(
    options: Options,
    corpora: Sequence[Corpus],
    mixture: Mixture,
    plan: dict[str, Any],
    source_field: str | None,
    names: Sequence[str],
) -> list[int]:
    output = options.outputs[0]
    form = Format.of(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = []
    with WorkFolder(output, [], plan, restart=options.restart, overwrite=options.overwrite) as folder:
        done = 0
        while folder.part("rows", done).done:
            parts.append(folder.part("rows", done))
            done += 1
        rows = interleave(corpora, mixture, done * _PART)
        with bar("mix", mixture.total, options.shown) as shown:
            for number in range(done, -(-mixture.total // _PART)):
                batch = [next(rows) for _ in range(min(_PART, mixture.total - number * _PART))]
                fields = [{**row, source_field: names[i]} if source_field else dict(row) for i, row in batch]
                parts.append(folder.part("rows", number))
                if form.needs_all_rows:
                    files = {
                        f"0.{n}": data for n, data in Blobs.encode(fields, np.zeros(len(fields), np.uint64)).items()
                    }
                else:
                    files = {"0.kept": form.encode(fields, options.text_field, options.documents == "lines")}
                parts[-1].write(files, {"drawn": np.bincount([i for i, _ in batch], minlength=len(corpora)).tolist()})
                shown.advance(len(batch))
        finish(output, form, parts, "0", ordered=False, field=options.text_field, lines=options.documents == "lines")
        return (
            np.sum([part.summary()["drawn"] for part in parts], axis=0, dtype=int).tolist()
            if parts
            else [0] * len(corpora)
        )


__all__ = ["Mixture", "interleave", "mix"]
