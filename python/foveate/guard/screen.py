"""Guard: rules over whole texts and over streams, out of which nothing comes that a rule forbids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from foveate.guard.audit import AuditLog
from foveate.guard.policy import Policy, Rule, read_policy
from foveate.guard.scan import ACTIONS, SIDES, Scanner, Span, Window, needed_library

_CONTEXT = 256  # characters before what is held back, which rules may look at


@dataclass(frozen=True)
class Finding:
    """start, end: characters of the text that was given. text: what stands there."""

    rule: str
    label: str
    action: str
    side: str
    start: int
    end: int
    text: str = field(repr=False)

    def sentence(self) -> str:
        what = self.rule if self.label == self.rule else f"{self.rule} ({self.label})"
        return f"the rule {what} of the guard forbids what the {self.side} has at character {self.start}"


@dataclass(frozen=True)
class Verdict:
    """action: the strictest of the findings', "pass" without any. text: what may go on; up to what was blocked, then the message."""

    action: str
    text: str
    findings: list[Finding]

    @property
    def blocked(self) -> Finding | None:
        return next((one for one in self.findings if one.action == "block"), None)


class Guard:
    """The rules of a policy: a YAML or JSON file, or the same as a mapping. ValueError, with the place and the cure, for one that is
    not right; ImportError where a rule needs a library that is missing.

    audit: who is told each finding; by default the policy's own file, if it names one. Classifiers and embedders are loaded here.
    Several threads may use one guard; a `Screen` belongs to one text.
    """

    def __init__(
        self, policy: str | os.PathLike[str] | Mapping[str, Any] | Policy, *, audit: AuditLog | None = None
    ) -> None:
        self.policy = policy if isinstance(policy, Policy) else read_policy(policy)
        needed_library()
        self.rules: list[Rule] = self.policy.rules
        if audit is None and self.policy.audit is not None:
            audit = AuditLog(self.policy.audit, texts=self.policy.audit_texts)
        self.audit = audit

    def reads(self, side: str) -> bool:
        """Whether a rule is on this side."""
        return any(side in rule.on for rule in self.rules)

    def changes(self, side: str) -> bool:
        """Whether a rule on this side blocks or redacts."""
        return any(side in rule.on and rule.action != "flag" for rule in self.rules)

    def check(self, text: str, side: str = "input", *, about: str = "") -> Verdict:
        """A whole text. about: which request it is, for the audit log."""
        screen = self.screen(side, about=about)
        allowed = screen.push(text)
        allowed += screen.end()
        strictest = max((ACTIONS.index(one.action) for one in screen.findings), default=-1)
        return Verdict("pass" if strictest < 0 else ACTIONS[strictest], allowed, screen.findings)

    def screen(self, side: str = "output", *, about: str = "") -> Screen:
        return Screen(self, side, about)

    def stream(self, pieces: Iterable[str], side: str = "output", *, about: str = "") -> Iterator[str]:
        """The pieces, less what may not come out; ends where a rule blocks. The pieces together are the text of `check`."""
        screen = self.screen(side, about=about)
        for piece in pieces:
            allowed = screen.push(piece)
            if allowed:
                yield allowed
            if screen.blocked is not None:
                return
        rest = screen.end()
        if rest:
            yield rest


class Screen:
    """One text on its way: `push` gives what is certain to be allowed, `end` the rest.

    Held back is what could still become a match of a rule that blocks or redacts, at most the policy's `hold` characters; a text that goes
    on longer without being decided is blocked, with the label "undecided".
    """

    def __init__(self, guard: Guard, side: str, about: str = "") -> None:
        if side not in SIDES:
            raise ValueError(f"side={side!r} must be {' or '.join(SIDES)}")
        self._guard, self._side, self._about = guard, side, about
        self._scanners: list[tuple[Rule, Scanner]] = [(rule, rule.scanner()) for rule in guard.rules if side in rule.on]
        self._text, self._at, self._offset = "", 0, 0
        self.findings: list[Finding] = []
        self.blocked: Finding | None = None

    @property
    def held(self) -> int:
        """Characters that were pushed and are neither out nor removed."""
        return len(self._text) - self._at

    def push(self, text: str) -> str:
        if self.blocked is not None or not text:
            return ""
        if not self._scanners:
            return text
        self._text += text
        return self._advance(final=False)

    def end(self) -> str:
        """What is left; nothing may be pushed after it."""
        return "" if self.blocked is not None else self._advance(final=True)

    def _advance(self, final: bool) -> str:
        window = Window(self._text, self._at, self._offset, final)
        opens = [(scanner.open(window), rule) for rule, scanner in self._scanners]
        limit = len(self._text) - self._guard.policy.hold
        held = [(place, rule) for place, rule in opens if place >= limit or rule.action != "flag"]
        cut, slowest = min(held, key=lambda one: one[0], default=(len(self._text), None))
        if cut == self._at and not final and cut >= limit:
            return ""
        spans = [(span, rule) for rule, scanner in self._scanners for span in scanner.find(window) if span.start < cut]
        spans.sort(key=lambda one: (one[0].start, -one[0].end))
        undecided = cut < limit and not final
        if not final:  # a match is let go of, or removed, as a whole
            for span, _ in reversed(spans):
                if span.end > cut > span.start:
                    cut = span.start
            spans = [one for one in spans if one[0].start < cut]
        out = self._apply(spans, cut)
        if undecided and self.blocked is None and slowest is not None:
            place = max(cut, self._at)
            self._block(self._found(Span(place, len(self._text), "undecided"), slowest, "block"))
            out += self._guard.policy.message
        return out

    def _apply(self, spans: list[tuple[Span, Rule]], cut: int) -> str:
        parts: list[str] = []
        at = self._at
        for span, rule in spans:
            found = self._found(span, rule, rule.action)
            if rule.action == "block":
                parts += [self._text[at : max(at, span.start)], self._guard.policy.message]
                self._block(found)
                return "".join(parts)
            if rule.action == "redact":
                if span.start >= at:
                    parts += [self._text[at : span.start], rule.replacement_of(span.label)]
                at = max(at, span.end)
        parts.append(self._text[at:cut])
        drop = max(0, min(self._at, cut - _CONTEXT))
        self._at, self._offset, self._text = max(at, cut) - drop, self._offset + drop, self._text[drop:]
        return "".join(parts)

    def _found(self, span: Span, rule: Rule, action: str) -> Finding:
        text = self._text[span.start : span.end]
        found = Finding(
            rule.name, span.label, action, self._side, span.start + self._offset, span.end + self._offset, text
        )
        self.findings.append(found)
        if self._guard.audit is not None:
            self._guard.audit.add(found, self._about)
        return found

    def _block(self, found: Finding) -> None:
        self.blocked = found
        self._text, self._at = "", 0
