"""The policy file: what it may say, checked with sentences, and the rules that it makes."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.data.personal import KINDS, PATTERNS
from foveate.data.redaction import Redact
from foveate.guard import injection, judges
from foveate.guard.scan import ACTIONS, SIDES, LengthScanner, PatternScanner, Scanner, SentenceScanner, Span

_CJK = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]")


@dataclass(frozen=True)
class Rule:
    """scanner: makes what looks at one text. replacement: of what is redacted; {} in it is the label in capitals."""

    name: str
    kind: str
    action: str
    on: tuple[str, ...]
    replacement: str
    scanner: Callable[[], Scanner]

    def replacement_of(self, label: str) -> str:
        return self.replacement.replace("{}", label.upper())


@dataclass(frozen=True)
class Policy:
    """message: what stands in place of what is blocked. hold: characters that a stream may hold back. audit: a file, or None."""

    rules: list[Rule]
    message: str = ""
    hold: int = 4096
    audit: Path | None = None
    audit_texts: bool = False


def read_policy(given: str | os.PathLike[str] | Mapping[str, Any]) -> Policy:
    """A policy from a .yaml, .yml or .json file, or from what such a file says. ValueError with the place of what is wrong."""
    if isinstance(given, Mapping):
        return _policy(given, "the policy", Path())
    file = Path(given)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"the policy {file} cannot be read: {error.strerror}") from error
    if file.suffix.lower() == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from None
    elif file.suffix.lower() in (".yaml", ".yml"):
        found = _yaml(text, file)
    else:
        raise ValueError(f"{file} must be a .yaml, .yml or .json file")
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object with rules, not a {type(found).__name__}")
    return _policy(found, str(file), file.parent)


def _yaml(text: str, file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            'a policy in YAML needs PyYAML: pip install "foveate[guard]"; or write it as a .json file'
        ) from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None


def _policy(found: Mapping[str, Any], place: str, folder: Path) -> Policy:
    reader = _Reader(found, place, folder)
    reader.known("rules", "message", "hold", "audit", "audit_texts")
    rows = found.get("rules")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise ValueError(f"{place} has no rules; give a list of them under the key rules")
    rules: list[Rule] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise ValueError(f"rule {number} of {place} must be an object with name and kind, not {row!r:.60}")
        rules.append(_rule(row, number, place, folder))
        if rules[-1].name in [rule.name for rule in rules[:-1]]:
            raise ValueError(f"two rules of {place} are called {rules[-1].name}; the counts need a name for each")
    hold = reader.number("hold", 4096, int)
    if hold < 64:
        raise ValueError(f"hold of {place} is {hold} characters; it must be 64 or more")
    audit = reader.text("audit", None)
    return Policy(
        rules,
        reader.text("message", "") or "",
        hold,
        None if audit is None else folder / audit,
        reader.flag("audit_texts"),
    )


def _rule(row: Mapping[str, Any], number: int, place: str, folder: Path) -> Rule:
    kind = row.get("kind")
    if kind not in KINDS_OF_RULES:
        meant = difflib.get_close_matches(str(kind), KINDS_OF_RULES, n=1)
        cure = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(KINDS_OF_RULES)}"
        raise ValueError(f"rule {number} of {place} has the kind {kind!r}; {cure}")
    name = row.get("name", kind)
    reader = _Reader(row, f"the rule {name!r} of {place}", folder)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
        raise ValueError(f"rule {number} of {place} has the name {name!r}; it must be letters, digits, points, - and _")
    keys, make, actions, default_on = KINDS_OF_RULES[kind]
    reader.known("name", "kind", "action", "on", "replacement", *keys)
    action = reader.text("action", "block")
    if action not in actions:
        raise ValueError(
            f"{reader.place} has the action {action!r}; for the kind {kind} there are {', '.join(actions)}"
        )
    on = reader.texts("on", list(default_on))
    wrong = [side for side in on if side not in SIDES]
    if wrong or not on:
        raise ValueError(f"{reader.place} has on: {on}; it must be input, output or both")
    replacement = reader.text("replacement", "<{}>")
    if "replacement" in row and action != "redact":
        raise ValueError(f"{reader.place} has a replacement, but its action is {action}; only redact replaces")
    return Rule(name, kind, str(action), tuple(on), str(replacement), make(reader))


class _Reader:
    """Keys of one object, with sentences for what is wrong."""

    def __init__(self, row: Mapping[str, Any], place: str, folder: Path) -> None:
        self.row, self.place, self.folder = row, place, folder

    def known(self, *names: str) -> None:
        for key in self.row:
            if key not in names:
                meant = difflib.get_close_matches(str(key), names, n=1)
                cure = f"did you mean {meant[0]}?" if meant else f"there are {', '.join(names)}"
                raise ValueError(f"{self.place} has the key {key!r}, which is not known; {cure}")

    def text(self, name: str, default: str | None) -> str | None:
        value = self.row.get(name, default)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} of {self.place} must be a text, not {value!r:.60}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.row.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} of {self.place} must be true or false, not {value!r:.60}")
        return value

    def number(self, name: str, default: Any, kind: type = float) -> Any:
        value = self.row.get(name, default)
        wanted: Any = int if kind is int else (int, float)
        if value is None or isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"{name} of {self.place} must be a number, not {value!r:.60}")
        return kind(value)

    def texts(self, name: str, default: list[str] | None = None) -> list[str]:
        value = self.row.get(name, default)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(entry, str) and entry for entry in value):
            raise ValueError(f"{name} of {self.place} must be a list of texts, none of them empty")
        if not value:
            raise ValueError(f"{name} of {self.place} is an empty list")
        return value

    def lines(self, name: str) -> list[str]:
        """The lines of the file that the key names, without empty ones and those that begin with #."""
        file = self.folder / str(self.text(name, None))
        try:
            rows = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{name} of {self.place} is {file}, which cannot be read: {error}") from error
        return [row.strip() for row in rows if row.strip() and not row.startswith("#")]

    def model(self) -> str:
        found = self.text("model", None)
        if found is None:
            raise ValueError(f"{self.place} has no model; give the folder of a checkpoint")
        here = self.folder / found
        return str(here) if here.exists() else found


def _pattern(reader: _Reader) -> Callable[[], Scanner]:
    flags = re.IGNORECASE if reader.flag("ignore_case") else 0
    compiled = []
    for text in reader.texts("patterns"):
        try:
            pattern = re.compile(text, flags)
        except re.error as error:
            raise ValueError(f"{reader.place} has the pattern {text!r}, which is not valid: {error}") from None
        if pattern.match(""):
            raise ValueError(f"{reader.place} has the pattern {text!r}, which matches the empty text and so every text")
        compiled.append((str(reader.row.get("name", "pattern")), pattern))
    return lambda: PatternScanner(compiled)


def _words(reader: _Reader) -> Callable[[], Scanner]:
    words = (reader.texts("words") if "words" in reader.row else []) + (
        reader.lines("file") if "file" in reader.row else []
    )
    if not words:
        raise ValueError(f"{reader.place} has no words; give words or a file with one in each line")
    flags = 0 if reader.flag("match_case") else re.IGNORECASE
    compiled = [(str(reader.row.get("name", "words")), word_pattern(words, flags))]
    return lambda: PatternScanner(compiled)


def word_pattern(words: Sequence[str], flags: int = re.IGNORECASE) -> re.Pattern[str]:
    """Whole words and phrases, any white space between the words of one; those with Chinese, Japanese or Korean letters anywhere."""
    parts = []
    for word in sorted(set(words), key=lambda one: (-len(one), one)):
        text = r"\s+".join(re.escape(piece) for piece in word.split())
        parts.append(text if _CJK.search(word) else rf"(?<!\w){text}(?!\w)")
    return re.compile("|".join(parts), flags)


def _personal(reader: _Reader) -> Callable[[], Scanner]:
    kinds = reader.texts("kinds", list(KINDS))
    try:
        redact = Redact(kinds=kinds, regions=reader.texts("regions") if "regions" in reader.row else ())
    except ValueError as error:
        raise ValueError(f"{reader.place}: {error}") from None
    patterns = [(kind, pattern) for kind in kinds for pattern in PATTERNS[kind]]

    def find(text: str) -> list[Span]:
        return [Span(*found) for found in redact.find(text)]

    return lambda: PatternScanner(patterns, find)


def _injection(reader: _Reader) -> Callable[[], Scanner]:
    signs = reader.texts("signs", list(injection.SIGNS))
    unknown = [sign for sign in signs if sign not in injection.SIGNS]
    if unknown:
        raise ValueError(f"{reader.place} has the sign {unknown[0]!r}; there are {', '.join(injection.SIGNS)}")
    compiled = injection.patterns(tuple(signs))
    return lambda: PatternScanner(compiled)


def _length(reader: _Reader) -> Callable[[], Scanner]:
    most = reader.number("characters", None, int)
    if most < 1:
        raise ValueError(f"{reader.place} allows {most} characters; it must be 1 or more")
    return lambda: LengthScanner(most)


def _judged(make: Callable[..., judges.Judge]) -> Callable[[_Reader], Callable[[], Scanner]]:
    def rule(reader: _Reader) -> Callable[[], Scanner]:
        judge = make(reader)
        return lambda: SentenceScanner(judge)

    return rule


def _threshold(reader: _Reader, default: float) -> float:
    found = reader.number("threshold", default)
    if not 0 <= found <= 1:
        raise ValueError(f"threshold of {reader.place} is {found}; it must be from 0 to 1")
    return found


def _topic(reader: _Reader) -> judges.Judge:
    return judges.topics(reader.model(), reader.texts("labels"), _threshold(reader, 0.5), reader.place)


def _similar(reader: _Reader) -> judges.Judge:
    examples = (reader.texts("examples") if "examples" in reader.row else []) + (
        reader.lines("file") if "file" in reader.row else []
    )
    if not examples:
        raise ValueError(f"{reader.place} has no examples; give examples or a file with one in each line")
    return judges.similar(reader.model(), examples, _threshold(reader, 0.6), str(reader.row.get("name", "similar")))


def _language(reader: _Reader) -> judges.Judge:
    return judges.language(reader.texts("allow"), _threshold(reader, 0.9), reader.place)


_Made = Callable[[_Reader], Callable[[], Scanner]]
# Each kind of rule: its own keys, what makes it, its actions, and the sides that it is on by default.
KINDS_OF_RULES: dict[str, tuple[tuple[str, ...], _Made, tuple[str, ...], tuple[str, ...]]] = {
    "pattern": (("patterns", "ignore_case"), _pattern, ACTIONS, SIDES),
    "words": (("words", "file", "match_case"), _words, ACTIONS, SIDES),
    "personal": (("kinds", "regions"), _personal, ACTIONS, SIDES),
    "injection": (("signs",), _injection, ACTIONS, ("input",)),
    "topic": (("model", "labels", "threshold"), _judged(_topic), ACTIONS, SIDES),
    "similar": (("model", "examples", "file", "threshold"), _judged(_similar), ACTIONS, SIDES),
    "language": (("allow", "threshold"), _judged(_language), ACTIONS, SIDES),
    "length": (("characters",), _length, ("flag", "block"), ("input",)),
}
