"""decontaminate: documents that hold what a model will be evaluated on."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate.data.cleaning import Paths
from foveate.data.corpus import Corpus, Row
from foveate.data.rewrite import Options, Outcome, rewrite
from foveate.data.shingles import WordHashes, ngrams, words
from foveate.data.tokens import read_tokenizer

ACTIONS = ("remove", "cut")
_WINDOW = 200  # characters around a match, and the least that a piece must have: GPT-3, appendix C
_MOST_PIECES = 10
_SPAN = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+"
)


def strings_of(row: dict[str, Any], fields: Sequence[str]) -> list[str]:
    """The texts of an evaluation row: those of `fields`, or all, also within lists."""

    def inside(value: Any) -> list[str]:
        if isinstance(value, str):
            return [value]
        if isinstance(value, dict):
            return [text for part in value.values() for text in inside(part)]
        return [text for part in value for text in inside(part)] if isinstance(value, list) else []

    return [text for name, value in row.items() if not fields or name in fields for text in inside(value)]


class Decontaminate:
    """The step: see `decontaminate`. It knows the n-grams of the evaluation rows as sorted 64-bit numbers, and whose they are."""

    def __init__(
        self, evaluation: Sequence[Row], field: str = "text", *, n: int = 13, least: int = 8, fields: Sequence[str] = (),
        action: str = "remove", tokenizer: str | None = None,
    ) -> None:  # fmt: skip
        self.field, self.n, self.action, self._tokenizer_path = field, n, action, tokenizer
        self._open()
        grams: dict[int, list[tuple[np.ndarray, int]]] = {}
        self.evaluation = [row.place for row in evaluation]
        self.too_short = 0
        for number, row in enumerate(evaluation):
            for text in strings_of(row, fields):
                hashes, _ = self._hashed(text)
                size = min(n, len(hashes))
                if size < least:
                    self.too_short += 1
                else:
                    grams.setdefault(size, []).append((ngrams(hashes, size), number))
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for size, pairs in grams.items():
            values = np.concatenate([values for values, _ in pairs])
            owners = np.concatenate([np.full(len(values), number) for values, number in pairs])
            unique, first = np.unique(values, return_index=True)
            self._tables[size] = (unique, owners[first])

    @property
    def ngrams(self) -> int:
        return sum(len(values) for values, _ in self._tables.values())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_words", "_tokenizer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def _open(self) -> None:
        self._words = WordHashes()
        self._tokenizer = read_tokenizer(self._tokenizer_path) if self._tokenizer_path else None

    def _hashed(self, text: str) -> tuple[np.ndarray, Any]:
        """uint64 of each word or token; and, by number, where it begins and ends."""
        if self._tokenizer is not None:
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            return np.array(encoded.ids, np.uint64), lambda i: encoded.offsets[i]
        if self.action == "remove":
            return self._words(words(text)), None
        small = text.lower()
        if len(small) != len(text):  # a few capitals become two letters
            small = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
        matches = list(_SPAN.finditer(small))
        return self._words([match[0] for match in matches]), lambda i: matches[i].span()

    def __call__(self, rows: Sequence[Row], extra: Any = None) -> list[Outcome]:
        return [self._document(row) for row in rows]

    def _document(self, row: Row) -> Outcome:
        text: str = row[self.field]
        hashes, span = self._hashed(text)
        hits: Counter[int] = Counter()
        spans: list[tuple[int, int]] = []
        for size, (values, owners) in self._tables.items():
            grams = ngrams(hashes, size)
            at = np.searchsorted(values, grams)
            at[at == len(values)] = 0
            matches = np.flatnonzero(values[at] == grams) if len(grams) else np.zeros(0, np.int64)
            hits.update(owners[at[matches]].tolist())
            if self.action == "cut":
                spans += [(span(i)[0], span(i + size - 1)[1]) for i in matches.tolist()]
        if not hits:
            return Outcome(dict(row))
        note = {"evaluation": {self.evaluation[number]: count for number, count in sorted(hits.items())}}
        if self.action == "remove":
            return Outcome(None, "contaminated", (), (), note)
        pieces, cuts = _pieces(text, spans)
        if not pieces or len(pieces) > _MOST_PIECES:
            return Outcome(None, "contaminated", (), (), note)
        text = "\n\n".join(pieces)
        return Outcome(
            {**row, self.field: text}, None, ("contaminated-cut",), [("contaminated-cut", cut) for cut in cuts], note
        )


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """What is left without the spans and the characters around them, in pieces of a least length; and the rest."""
    pieces, cuts, at = [], [], 0
    merged: list[list[int]] = []
    for start, end in sorted((max(0, a - _WINDOW), min(len(text), b + _WINDOW)) for a, b in spans):
        if merged and start <= merged[-1][1] + _WINDOW:  # what would be left between them is too short for a piece
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    for start, end in [*merged, [len(text), len(text)]]:
        if start - at >= _WINDOW:
            pieces.append(text[at:start])
        elif text[at:start].strip():
            cuts.append(text[at:start])
        if end > start:
            cuts.append(text[start:end])
        at = end
    return pieces, cuts


def decontaminate(
    paths: Paths,
    output: str | os.PathLike[str],
    *,
    against: Paths,
    n: int = 13,
    least: int = 8,
    fields: Sequence[str] = (),
    action: str = "remove",
    tokenizer: str | None = None,
    hits: str | os.PathLike[str] | None = None,
    text_field: str = "text",
    documents: str = "pieces",
    **options: Any,
) -> dict[str, Any]:
    """Documents without those that share n words in a row with an evaluation file.

    against: the evaluation files, in any format that is read; `fields`: which of their fields count, by default every text. n: 13 words, as
    in Brown et al. 2020, "Language Models are Few-Shot Learners", appendix C; a shorter text counts as a whole if it has at least `least`
    words. Words are compared in small letters, without punctuation. tokenizer: a folder or tokenizer.json, by which n counts tokens.

    action: "remove" the document, or "cut" the match with 200 characters on each side, as GPT-3 did: pieces below 200 characters go too,
    and documents in more than 10 pieces as a whole.

    hits: a JSON file, {place of an evaluation row: documents that held some of it}. Returns counts, and "evaluation_rows" with
    "evaluation_rows_hit".
    """
    if action not in ACTIONS:
        raise ValueError(f"action={action!r} must be one of {', '.join(ACTIONS)}")
    if not 1 <= least <= n:
        raise ValueError(f"least={least} and n={n}: they must be 1 <= least <= n")
    evaluation = Corpus(against)
    step = Decontaminate(
        list(evaluation.rows()), text_field, n=n, least=least, fields=fields, action=action, tokenizer=tokenizer
    )
    if not step.ngrams:
        raise ValueError(
            f"the evaluation files have no text of at least {least} words{' in ' + ', '.join(fields) if fields else ''}; lower least, or "
            "name the right fields"
        )
    settings = {
        "against": evaluation.signature(), "n": n, "least": least, "fields": list(fields), "action": action, "tokenizer": tokenizer,
    }  # fmt: skip
    chosen = Options(output, text_field, documents, **options)
    report = rewrite("decontaminate", step, Corpus(paths, documents), chosen, settings)
    touched = _hits(chosen.removed_file)
    report |= {
        "evaluation_rows": len(step.evaluation), "evaluation_rows_hit": len(touched), "evaluation_ngrams": step.ngrams,
        "evaluation_texts_too_short": step.too_short,
    }  # fmt: skip
    if hits is not None:
        Path(hits).write_text(
            json.dumps(dict(touched.most_common()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        report["hits"] = str(hits)
    return report


def _hits(removed: Path) -> Counter[str]:
    """Documents that held some of each evaluation row."""
    counts: Counter[str] = Counter()
    last = ""
    for row in Corpus(removed).rows() if removed.stat().st_size else ():
        if row.get("reason") == "contaminated" or (row.get("reason") == "contaminated-cut" and row["place"] != last):
            counts.update(row["evaluation"].keys())
        last = row["place"]
    return counts
