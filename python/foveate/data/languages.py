"""language: which language each document is in; keeps those that are wanted."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from foveate.data.cleaning import Paths
from foveate.data.corpus import Corpus, Row
from foveate.data.rewrite import Options, Outcome, rewrite

_READ = 4000  # characters of a document, from its beginning
_FEWEST = 20  # letters, below which an identification is a guess


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ImportError('telling languages needs py3langid: pip install "foveate[data]"') from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """(ISO 639 code, probability) by py3langid, from the first 4000 characters. ("und", 0.0) for fewer than 20
    letters."""
    beginning = text[:_READ]
    if sum(map(str.isalpha, beginning)) < _FEWEST:
        return "und", 0.0
    code, probability = _identifier().classify(beginning)
    return str(code), float(probability)


def languages() -> list[str]:
    """The codes that `identify` may give, without "und"."""
    return sorted(str(code) for code in _identifier().labels)


class Language:
    """The step: see `language`."""

    def __init__(
        self, field: str = "text", *, keep: Sequence[str] = (), threshold: float = 0.65, label: bool = True
    ) -> None:
        self.field, self.keep, self.threshold, self.label = field, frozenset(keep), threshold, label
        unknown = sorted(self.keep.difference(languages(), ["und"]))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} is no language that can be told; the codes are und, {', '.join(languages())}"
            )

    def __call__(self, rows: Sequence[Row], extra: Any = None) -> list[Outcome]:
        return [self._document(row) for row in rows]

    def _document(self, row: Row) -> Outcome:
        code, probability = identify(row[self.field])
        note = {"language": code, "language_score": round(probability, 4)}
        sure = probability >= self.threshold or code == "und"
        if self.keep and not (code in self.keep and sure):
            reason = f"language-{code}" if code not in self.keep else f"language-{code}-unsure"
            return Outcome(None, reason, (f"is-{code}",), (), note)
        return Outcome({**row, **note} if self.label else dict(row), None, (f"is-{code}",))


def language(
    paths: Paths,
    output: str | os.PathLike[str],
    *,
    keep: Sequence[str] = (),
    threshold: float = 0.65,
    label: bool = True,
    text_field: str = "text",
    documents: str = "pieces",
    **options: Any,
) -> dict[str, Any]:
    """Documents with the fields "language" (ISO 639) and "language_score"; only those in the languages `keep`, if it is not empty.

    threshold: the least probability that is taken for sure; 0.65 is FineWeb's (its model is another). "und" stands for documents of fewer
    than 20 letters. label: whether the fields are added. Labels "is-CODE" count the languages. Identification is py3langid's (Lui and
    Baldwin 2012, "langid.py: An Off-the-shelf Language Identification Tool"), offline.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold={threshold} must be from 0 to 1")
    step = Language(text_field, keep=keep, threshold=threshold, label=label)
    settings = {"keep": sorted(step.keep), "threshold": threshold, "label": label}
    return rewrite(
        "language", step, Corpus(paths, documents), Options(output, text_field, documents, **options), settings
    )
