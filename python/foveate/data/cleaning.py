"""clean: repaired Unicode, lines of boilerplate taken out, documents of poor quality removed."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from foveate.data.corpus import Corpus, Row
from foveate.data.rewrite import Options, Outcome, rewrite
from foveate.data.rules.features import Features
from foveate.data.rules.lines import LINE_NAMES, MIN_SENTENCES, SENTENCES, filter_lines, sentences
from foveate.data.rules.table import chosen

Paths = Sequence[str | os.PathLike[str]] | str | os.PathLike[str]
# FineWeb's own recipe: Gopher's rules, those of C4 but the one about the ends of lines, its own three.
DEFAULT_RULES = ("gopher", "c4", "fineweb", "boilerplate")
DEFAULT_WITHOUT = ("c4-terminal-punctuation",)
_SUSPICIOUS = re.compile(r"[^\t\n\x20-\x7e]|&[#\w]+;")  # what ftfy or NFC could change
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\ufeff\ufff9-\ufffb]")
_MANY_SPACES = re.compile(r"[ \t\u00a0\u2000-\u200a\u3000]{2,}(?=\S)|[ \t]+$", re.MULTILINE)
_MANY_LINES = re.compile(r"\n{3,}")


def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(
            'repairing Unicode needs ftfy: pip install "foveate[data]"; or switch it off (--no-unicode)'
        ) from error
    return ftfy


def repair(text: str) -> str:
    """Mojibake, HTML entities, ligatures of broken encoders and control characters repaired by ftfy, then NFC, without zero-width spaces
    and byte order marks. Line ends become newlines. Quotation marks stay as they are."""
    if _SUSPICIOUS.search(text) is None:
        return text
    fixed = _ftfy().fix_text(text, uncurl_quotes=False, normalization=None)
    return unicodedata.normalize("NFC", _CONTROLS.sub("", fixed))


def tidy(text: str) -> str:
    """At most one empty line after another, and no white space at the end of a line; several spaces within one become one."""
    return _MANY_LINES.sub(
        "\n\n", _MANY_SPACES.sub(lambda m: " " if m.end() < len(text) and text[m.end()] != "\n" else "", text)
    )


class Clean:
    """The step: see `clean`."""

    def __init__(
        self,
        field: str = "text",
        *,
        unicode: bool = True,
        whitespace: bool = True,
        rules: Sequence[str] = DEFAULT_RULES,
        without: Sequence[str] = DEFAULT_WITHOUT,
        thresholds: Mapping[str, float] | None = None,
    ) -> None:
        self.field, self._unicode, self._whitespace = field, unicode, whitespace
        if unicode:
            _ftfy()
        self._named = (tuple(rules), tuple(without), dict(thresholds or {}))
        self.rules, self.lines = chosen(*self._named, LINE_NAMES)

    def __getstate__(self) -> dict[str, Any]:
        """Without the rules, whose functions do not pickle."""
        return {name: value for name, value in vars(self).items() if name not in ("rules", "lines")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.rules, self.lines = chosen(*self._named, LINE_NAMES)

    def __call__(self, rows: Sequence[Row], extra: Any = None) -> list[Outcome]:
        return [self._document(row) for row in rows]

    def _document(self, row: Row) -> Outcome:
        text, labels = row[self.field], []
        if self._unicode and (fixed := repair(text)) != text:
            text = fixed
            labels.append("unicode")
        if self._whitespace and (tidied := tidy(text)) != text:
            text = tidied
            labels.append("whitespace")
        before = text
        text, cuts = filter_lines(text, self.lines)
        labels += dict.fromkeys(name for name, _ in cuts)
        if text != before and not cuts:
            labels.append("c4-citations")
        if not text.strip():
            return Outcome(None, "empty", labels, cuts)
        features = Features(text)
        for rule, threshold in self.rules:
            if rule.breaks(features, threshold):
                value = round(float(rule.value(features)), 4)
                return Outcome(None, rule.name, labels, cuts, {"value": value, "threshold": threshold})
        if SENTENCES in self.lines and (count := sentences(text)) < MIN_SENTENCES:
            return Outcome(None, SENTENCES, labels, cuts, {"value": count, "threshold": MIN_SENTENCES})
        return Outcome({**row, self.field: text}, None, labels, cuts)


def clean(
    paths: Paths,
    output: str | os.PathLike[str],
    *,
    unicode: bool = True,
    whitespace: bool = True,
    rules: Sequence[str] = DEFAULT_RULES,
    without: Sequence[str] = DEFAULT_WITHOUT,
    thresholds: Mapping[str, float] | None = None,
    text_field: str = "text",
    documents: str = "pieces",
    **options: Any,
) -> dict[str, Any]:
    """Documents with repaired Unicode and without boilerplate; those that break a quality rule are removed.

    unicode, whitespace: see `repair` and `tidy`. rules: names of rules or of their groups (gopher, c4, fineweb, boilerplate, all);
    without: those to leave out; thresholds: {rule: number} in place of the published ones. `foveate.data.rules.table` has the rules with
    their papers, `foveate.data.rules.lines` those about single lines. They are made for languages that part words by spaces; the stop
    words are English.

    Each removed document goes to the removed file with the first rule that it breaks, the value and the threshold, each line that was
    taken out with its rule. Returns the counts: {"documents", "kept", "removed", "changed", "reasons", "labels", "bytes_in", "bytes_out",
    ...}. text_field, documents and the other options: see the module `foveate.data`.
    """
    step = Clean(
        text_field, unicode=unicode, whitespace=whitespace, rules=rules, without=without, thresholds=thresholds
    )
    settings = {
        "unicode": unicode, "whitespace": whitespace, "rules": {rule.name: threshold for rule, threshold in step.rules},
        "line_rules": sorted(step.lines),
    }  # fmt: skip
    return rewrite("clean", step, Corpus(paths, documents), Options(output, text_field, documents, **options), settings)
