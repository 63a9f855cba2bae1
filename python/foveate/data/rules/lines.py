"""What is taken out of a document line by line: C4's rules, and navigation that pages have around their text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

_CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")
_TERMINAL = (".", "!", "?", '"', "”", "'")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_NAVIGATION = re.compile(
    r"(?:skip to (?:main )?content|share (?:this|on) .*|(?:sign|log) ?(?:in|up|out)|subscribe(?: to our newsletter| now)?|read more|"
    r"all rights reserved.*|(?:©|\(c\)|copyright) .*|back to top|click here.*|follow us.*|leave a (?:comment|reply).*|"
    r"(?:previous|next)(?: (?:post|page|article))?|(?:home|menu|search|contact(?: us)?|about(?: us)?|faq|login|register)"
    r"(?: *[|/»>·•] *[\w ]+)*|\d+ (?:comments?|shares?|likes?|views?)|advertisement|loading\.*|page \d+ of \d+)\.?",
    re.IGNORECASE,
)
_LONGEST_NAVIGATION = 80  # characters
_SENTENCE_END = re.compile(r"[.!?](?:[\"'”’)\]]+)?(?=\s+[\"'“‘(\[]?[A-Z0-9]|\s*$)")
MIN_SENTENCES = 3


class LineRule(NamedTuple):
    name: str
    meaning: str
    drops: Callable[[str], bool]


LINE_RULES: tuple[LineRule, ...] = (
    LineRule("c4-long-words", "a word has more than 1000 characters", lambda s: len(s) > 1000 and any(len(w) > 1000 for w in s.split())),
    LineRule("c4-terminal-punctuation", "the line does not end in . ! ? or a quotation mark, or ends in an ellipsis",
             lambda s: not s.endswith(_TERMINAL) or s.endswith("...")),
    LineRule("c4-words-in-line", "the line has fewer than 5 words", lambda s: len(s.split(None, 4)) < 5),
    LineRule("c4-javascript", "the line has the word Javascript", lambda s: "javascript" in s.lower()),
    LineRule("c4-policy", "the line is about cookies, terms of use or a privacy policy", lambda s: any(p in s.lower() for p in _POLICY)),
    LineRule("boilerplate-navigation", "the line is a menu, a share button, a copyright notice or the like",
             lambda s: len(s) <= _LONGEST_NAVIGATION and _NAVIGATION.fullmatch(s) is not None),
)  # fmt: skip
CITATIONS, SENTENCES = "c4-citations", "c4-min-sentences"
OTHER_RULES = {
    CITATIONS: "marks such as [3], [edit] and [citation needed] are taken out of the text",
    SENTENCES: f"after all this the document has fewer than {MIN_SENTENCES} sentences",
}
"""In the order of the paper: the lines first, then the number of sentences that are left."""

LINE_NAMES = tuple(rule.name for rule in LINE_RULES) + tuple(OTHER_RULES)


def filter_lines(text: str, names: set[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text without the lines that a rule of `names` drops, and those lines, as (rule, line). Empty lines stay."""
    if CITATIONS in names and "[" in text:
        text = _CITATION.sub("", text)
    small = text.lower()
    possible = {"c4-javascript": "javascript" in small, "c4-policy": any(phrase in small for phrase in _POLICY)}
    rules = [rule for rule in LINE_RULES if rule.name in names and possible.get(rule.name, True)]
    if not rules:
        return text, []
    kept, cuts = [], []
    for line in text.split("\n"):
        stripped = line.strip()
        broken = next((rule.name for rule in rules if rule.drops(stripped)), None) if stripped else None
        if broken is None:
            kept.append(line)
        else:
            cuts.append((broken, line))
    return "\n".join(kept) if cuts else text, cuts


def sentences(text: str) -> int:
    """About: ends of sentences, by their punctuation."""
    return len(_SENTENCE_END.findall(text))
