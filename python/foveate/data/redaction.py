"""redact: personal data and secrets in documents become placeholders such as <EMAIL>."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from foveate.data.cleaning import Paths
from foveate.data.corpus import Corpus, Row
from foveate.data.personal import FINDERS, KINDS, Found, Phones
from foveate.data.rewrite import Options, Outcome, rewrite

_DIGIT = re.compile(r"\d")


class Redact:
    """The step: see `redact`. find(text) gives what is found, in order and without overlaps."""

    def __init__(
        self, field: str = "text", *, kinds: Sequence[str] = KINDS, regions: Sequence[str] = (), placeholder: str = "<{}>",
        values: bool = True,
    ) -> None:  # fmt: skip
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown:
            raise ValueError(f"there is no kind {', '.join(unknown)}; the kinds are {', '.join(KINDS)}")
        self.field, self.kinds, self._placeholder, self._values = field, tuple(kinds), placeholder, values
        self._phones = Phones(regions) if "phone" in kinds else None

    def find(self, text: str) -> list[Found]:
        digits = _DIGIT.search(text) is not None
        finders = [
            f for kind, f in FINDERS.items() if kind in self.kinds and (digits or kind in ("email", "key", "ip"))
        ]
        if self._phones is not None and digits:
            finders.append(self._phones)
        findings: list[Found] = []
        taken = bytearray(len(text))
        for finder in finders:
            for one in finder(text):
                if not any(taken[one.start : one.end]):
                    taken[one.start : one.end] = b"\1" * (one.end - one.start)
                    findings.append(one)
        return sorted(findings)

    def text(self, text: str) -> tuple[str, list[Found]]:
        """The text with placeholders, and what was found."""
        findings = self.find(text)
        parts, at = [], 0
        for one in findings:
            parts += [text[at : one.start], self._placeholder.replace("{}", one.kind.upper())]
            at = one.end
        return "".join([*parts, text[at:]]), findings

    def __call__(self, rows: Sequence[Row], extra: Any = None) -> list[Outcome]:
        outcomes = []
        for row in rows:
            text, findings = self.text(row[self.field])
            labels = list(Counter(one.kind for one in findings).elements())
            cuts = [(one.kind, row[self.field][one.start : one.end] if self._values else "") for one in findings]
            outcomes.append(Outcome({**row, self.field: text}, None, labels, cuts))
        return outcomes


def redact(
    paths: Paths,
    output: str | os.PathLike[str],
    *,
    kinds: Sequence[str] = KINDS,
    regions: Sequence[str] = (),
    placeholder: str = "<{}>",
    values: bool = True,
    text_field: str = "text",
    documents: str = "pieces",
    **options: Any,
) -> dict[str, Any]:
    """Documents whose personal data and secrets are placeholders, such as <EMAIL> and <CARD>; {} in `placeholder` is the kind.

    kinds:
      email  mail addresses
      phone  international numbers (+44 ...), and national ones of the `regions` (US, DE, ...), that phonenumbers calls valid
      card   numbers of an issuer's length and first digits, whose Luhn check digit fits
      iban   account numbers of a country's length, whose check digits (mod 97) fit
      ip     public IPv4 and IPv6 addresses; private and documentation ones stay, and what follows "version"
      key    keys by the prefixes of well-known services, private keys in PEM, and values beside names such as api_key or password that
             have at least 3.5 bits of entropy a character

    The removed file has each thing that was found, with its kind and the place of its document, and is as secret as the input; with
    values=False it says what was found where, without the values, and a report, which shows them, is refused. Labels count what was
    found. Names and postal addresses of people are not found.
    """
    if not values and options.get("report") is not None:
        raise ValueError(
            "the report shows documents before their redaction; with values=False there is none: leave report out"
        )
    step = Redact(text_field, kinds=kinds, regions=regions, placeholder=placeholder, values=values)
    settings = {"values": values, "kinds": list(step.kinds), "regions": list(regions), "placeholder": placeholder}
    return rewrite(
        "redact", step, Corpus(paths, documents), Options(output, text_field, documents, **options), settings
    )
