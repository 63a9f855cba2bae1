"""RULES: name, paper, what is measured, and the published threshold of each quality rule. Every rule can be switched off or given another
threshold; each document that is removed names the first rule that it breaks.

Papers:
  gopher   Rae et al. 2021, "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", appendix A.1, table A1
  c4       Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", section 2.2
  fineweb  Penedo et al. 2024, "The FineWeb Datasets: Decanting the Web for the Finest Text Data at Scale", section 3.6
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from foveate.data.rules.features import Features

_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_BULLETS = ("•", "‣", "◦", "●", "▪", "*", "-", "–")
_ELLIPSES = ("...", "…")
_LINE_ENDS = (".", "!", "?", '"', "'", "”", "’", "…", ":", ";", "。", "！", "？", "」", "』")


class Rule(NamedTuple):
    """value(features) is compared with the threshold: below it for kind "least", above it for "most", the document is removed."""

    name: str
    kind: str
    threshold: float
    value: Callable[[Features], float]
    meaning: str

    @property
    def paper(self) -> str:
        return self.name.partition("-")[0]

    def breaks(self, features: Features, threshold: float) -> bool:
        value = self.value(features)
        return value < threshold if self.kind == "least" else value > threshold


def _words(d: Features) -> float:
    return len(d.words)


def _mean_word_length(d: Features) -> float:
    return float(d.word_lengths.mean()) if len(d.words) else 0.0


def _per_word(*symbols: str) -> Callable[[Features], float]:
    return lambda d: sum(map(d.text.count, symbols)) / max(1, len(d.words))


def _share(lines: Sequence[str], fits: Callable[[str], bool]) -> float:
    return sum(map(fits, lines)) / max(1, len(lines))


def _bullets(d: Features) -> float:
    return _share(d.lines, lambda line: line.lstrip().startswith(_BULLETS))


def _ellipses(d: Features) -> float:
    return _share(d.lines, lambda line: line.rstrip().endswith(_ELLIPSES))


def _alphabetic(d: Features) -> float:
    return _share(d.tokens, lambda token: token.isalpha() or any(map(str.isalpha, token)))


def _stop_words(d: Features) -> float:
    return len(_STOP_WORDS.intersection(map(str.lower, d.words)))


def _top(n: int) -> Callable[[Features], float]:
    return lambda d: d.top_ngram(n)


def _duplicate(n: int) -> Callable[[Features], float]:
    return lambda d: d.duplicate_ngrams(n)


def _ngrams() -> list[Rule]:
    top = {2: 0.20, 3: 0.18, 4: 0.16}
    again = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    return [
        *(
            Rule(f"gopher-top-{n}-gram", "most", t, _top(n), f"characters in the most frequent {n}-gram")
            for n, t in top.items()
        ),
        *(
            Rule(f"gopher-duplicate-{n}-grams", "most", t, _duplicate(n), f"characters in {n}-grams that come again")
            for n, t in again.items()
        ),
    ]


RULES: tuple[Rule, ...] = (
    Rule("gopher-min-words", "least", 50, _words, "words"),
    Rule("gopher-max-words", "most", 100_000, _words, "words"),
    Rule("gopher-min-word-length", "least", 3, _mean_word_length, "mean characters of a word"),
    Rule("gopher-max-word-length", "most", 10, _mean_word_length, "mean characters of a word"),
    Rule("gopher-hashes", "most", 0.1, _per_word("#"), "signs # for each word"),
    Rule("gopher-ellipses", "most", 0.1, _per_word(*_ELLIPSES), "ellipses for each word"),
    Rule("gopher-bullet-lines", "most", 0.9, _bullets, "lines that begin with a bullet"),
    Rule("gopher-ellipsis-lines", "most", 0.3, _ellipses, "lines that end with an ellipsis"),
    Rule("gopher-alphabetic-words", "least", 0.8, _alphabetic, "words with a letter"),
    Rule("gopher-stop-words", "least", 2, _stop_words, "different ones of the, be, to, of, and, that, have, with"),
    Rule("gopher-duplicate-lines", "most", 0.30, lambda d: d.duplicates(d.lines)[0], "lines that come again"),
    Rule("gopher-duplicate-paragraphs", "most", 0.30, lambda d: d.duplicates(d.paragraphs)[0], "paragraphs that come again"),
    Rule("gopher-duplicate-line-characters", "most", 0.20, lambda d: d.duplicates(d.lines)[1], "characters in lines that come again"),
    Rule("gopher-duplicate-paragraph-characters", "most", 0.20, lambda d: d.duplicates(d.paragraphs)[1],
         "characters in paragraphs that come again"),
    *_ngrams(),
    Rule("fineweb-line-punctuation", "least", 0.12, lambda d: _share(d.lines, lambda line: line.rstrip().endswith(_LINE_ENDS)),
         "lines that end in punctuation"),
    Rule("fineweb-duplicate-line-characters", "most", 0.1, lambda d: d.duplicates(d.lines)[1], "characters in lines that come again"),
    Rule("fineweb-short-lines", "most", 0.67, lambda d: _share(d.lines, lambda line: len(line) < 30), "lines of fewer than 30 characters"),
    Rule("c4-lorem-ipsum", "most", 0, lambda d: "lorem ipsum" in d.text.lower(), "whether there is lorem ipsum"),
    Rule("c4-curly-brackets", "most", 0, lambda d: "{" in d.text, "whether there is a curly bracket"),
)  # fmt: skip
"""In the order in which they are asked. What C4 does to single lines, and its count of sentences after it, is in `lines`."""

BY_NAME = {rule.name: rule for rule in RULES}


def chosen(
    names: Sequence[str], without: Sequence[str], thresholds: Mapping[str, float], others: Sequence[str]
) -> tuple[list[tuple[Rule, float]], set[str]]:
    """The rules with their thresholds, and those of `others` (the line rules) that are meant. names and without: of rules or groups."""
    known = [*BY_NAME, *others]
    groups = {name.partition("-")[0] for name in known}

    def expanded(given: Sequence[str]) -> set[str]:
        members: set[str] = set()
        for name in given:
            if name not in known and name not in groups and name != "all":
                raise ValueError(
                    f"there is no rule {name!r}; the groups are {', '.join(sorted(groups))}, and the rules {', '.join(known)}"
                )
            members |= {one for one in known if name in (one, "all") or one.startswith(f"{name}-")}
        return members

    meant = expanded(names) - expanded(without)
    for name in thresholds:
        if name not in BY_NAME:
            raise ValueError(f"there is no threshold {name!r}; rules with one are {', '.join(BY_NAME)}")
    rules = [(rule, float(thresholds.get(rule.name, rule.threshold))) for rule in RULES if rule.name in meant]
    return rules, meant & set(others)
