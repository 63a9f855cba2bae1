"""The steps of `foveate.data` on Ray Data: a `ray.data.Dataset` in, another out, on all nodes of a cluster. `pip install "ray[data]"`.

Each row is a document with its text in `text_field`. A step adds the columns "reason" (why the document is to be removed; empty for one
that is kept) and "labels" (what was done to it, parted by spaces); `kept` and `removed` divide the two, so that nothing is lost:

    marked = ray_data.clean(ray.data.read_json("crawl/"), unicode=True)
    ray_data.kept(marked).write_parquet("clean/")
    ray_data.removed(marked).write_json("removed/")

What the options mean is said by the functions of the same names in `foveate.data`; equal documents get equal answers there and here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.cleaning import Clean
from foveate.data.corpus import Corpus, Row
from foveate.data.decontamination import Decontaminate
from foveate.data.deduplication import KEEPS, Signatures, decide
from foveate.data.languages import Language
from foveate.data.redaction import Redact
from foveate.data.rewrite import Step
from foveate.data.splitting import Split

if TYPE_CHECKING:
    from ray.data import Dataset

_REASON, _LABELS, _SIDE = "reason", "labels", "side"


def _step(data: Dataset, kind: type, options: dict[str, Any], text_field: str) -> Dataset:
    step: Step = kind(field=text_field, **options)  # wrong options raise here, not on a worker

    def marked(batch: Any) -> Any:
        import pandas

        rows = [Row(fields, "a row of the data set") for fields in batch.to_dict("records")]
        made = []
        for row, outcome in zip(rows, step(rows)):
            fields = dict(row) if outcome.row is None else dict(outcome.row)
            made.append({**fields, _REASON: outcome.reason or "", _LABELS: " ".join(outcome.labels)})
        return pandas.DataFrame(made)

    return data.map_batches(marked, batch_format="pandas")


def clean(data: Dataset, *, text_field: str = "text", **options: Any) -> Dataset:
    """options: of `foveate.data.clean` (unicode, whitespace, rules, without, thresholds)."""
    return _step(data, Clean, options, text_field)


def language(data: Dataset, *, text_field: str = "text", **options: Any) -> Dataset:
    """options: keep, threshold, label."""
    return _step(data, Language, options, text_field)


def redact(data: Dataset, *, text_field: str = "text", **options: Any) -> Dataset:
    """options: kinds, regions, placeholder. What was found is not recorded here."""
    return _step(data, Redact, options, text_field)


def decontaminate(data: Dataset, *, against: Any, text_field: str = "text", **options: Any) -> Dataset:
    """against: evaluation files, read in this process. options: n, least, fields, action, tokenizer."""
    evaluation = list(Corpus(against).rows())
    return _step(data, Decontaminate, {"evaluation": evaluation, **options}, text_field)


def dedup(
    data: Dataset, *, near: bool = True, threshold: float = 0.8, ngram: int = 5, permutations: int = 128, keep: str = "first",
    seed: int = 1, text_field: str = "text",
) -> Dataset:  # fmt: skip
    """Marks all but one of each group of equal or nearly equal documents, with the reason "duplicate" or "near-duplicate".

    Signatures are made on the workers and compared in this process, which holds 20 bytes and 4 for each permutation of every document.
    keep="first" is the order of the data set, which has to be the same at each execution: materialize a shuffled one.
    """
    if keep not in KEEPS:
        raise ValueError(f"keep={keep!r} must be one of {', '.join(KEEPS)}")
    signatures = Signatures(text_field, "document", 1, ngram, permutations if near else 0, seed)
    import ray

    ray.data.DataContext.get_current().execution_options.preserve_order = True
    data = data.materialize()  # read once: both passes have to see the same order

    def signed(batch: Any) -> dict[str, Any]:
        of_batch = signatures(list(batch[text_field]))
        near_bytes = [row.tobytes() for row in of_batch["near"]] if near else [b""] * len(of_batch["lengths"])
        return {
            "length": of_batch["lengths"],
            "exact": [row.tobytes() for row in of_batch["exact"]],
            "near": near_bytes,
        }

    lengths, exact, nearly = [], [], []
    for row in data.map_batches(signed, batch_format="numpy").iter_rows():
        lengths.append(row["length"])
        exact.append(row["exact"])
        nearly.append(row["near"])
    kept_unit, similarity = decide(
        np.array(lengths, np.int64), np.frombuffer(b"".join(exact), np.uint64).reshape(-1, 2),
        np.frombuffer(b"".join(nearly), np.uint32).reshape(len(lengths), -1) if near else None,
        threshold=threshold, keep=keep,
    )  # fmt: skip
    reasons = np.where(kept_unit < 0, "", np.where(similarity < 0, "duplicate", "near-duplicate"))
    frames, start = [], 0
    for frame in data.iter_batches(batch_size=4096, batch_format="pandas"):
        frames.append(frame.assign(**{_REASON: reasons[start : start + len(frame)].tolist()}))
        start += len(frame)
    return ray.data.from_pandas(frames)


def split(
    data: Dataset, *, shares: dict[str, float], group: str | None = None, seed: int = 0, text_field: str = "text"
) -> Dataset:
    """Adds the column "side" with the name of the share, the one that `foveate.data.split` gives the document."""
    names = list(shares)
    step = Split(text_field, group, list(shares.values()), seed, shuffle=False)

    def sided(batch: Any) -> Any:
        rows = [Row(fields, "a row of the data set") for fields in batch.to_dict("records")]
        batch[_SIDE] = [names[outcome.target] for outcome in step(rows)]
        return batch

    return data.map_batches(sided, batch_format="pandas")


def kept(marked: Dataset) -> Dataset:
    """The documents without a reason for their removal, without the column that says it."""
    return marked.map_batches(lambda frame: frame[frame[_REASON] == ""].drop(columns=[_REASON]), batch_format="pandas")


def removed(marked: Dataset) -> Dataset:
    """The others, with it."""
    return marked.map_batches(lambda frame: frame[frame[_REASON] != ""], batch_format="pandas")
