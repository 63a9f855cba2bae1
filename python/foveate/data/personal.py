"""What identifies a person or opens a door, found in text: mail addresses, telephone, card and account numbers, IP addresses, keys."""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

KINDS = ("email", "phone", "card", "iban", "ip", "key")

_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9][\w.+%-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])"
)
_CARD = re.compile(r"(?<![\w.+-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{5}|\d{13,19})(?![\w-]|\.\d)")
# Issuers by the first digits, and how many digits their numbers have (ISO/IEC 7812).
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}|"
    r"6(?:011|5\d\d|4[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|62\d{14,17}"
)
_IBAN = re.compile(r"(?<![\w-])[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")
# Characters of an account number in each country of the IBAN registry (ISO 13616).
_IBAN_LENGTHS = {
    code: length
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK", 21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL", 24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST",
        26: "IS TR", 27: "BI DJ FR GR IT MC MR SM", 28: "AL AZ BY CY DO GT HN HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU YE",
        31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip
_IP4 = re.compile(r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:|:(?=:)){2,7}(?::?[0-9a-fA-F]{1,4})?(?::(?=:))?(?![\w:])")
_VERSION = re.compile(r"(?:\bv|version|release|rev\.?|build|section|chapter|§)\s*$", re.IGNORECASE)
_PHONE = re.compile(r"(?<![\w.+/:,-])(?:\+|\(|\b)\(?\d(?:[ .()/\u00a0\u2011-]{0,3}\d){6,14}(?![\w]|[.,:/-]\d)")
_DATE = re.compile(r"(?:19|20)\d\d([-./ ])\d{1,2}\1\d{1,2}(?!\d)|\d{1,2}([-./])\d{1,2}\2(?:19|20)?\d\d(?!\d)")
_KEYS = re.compile(
    r"(?<![A-Za-z0-9_-])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{60,255}|glpat-[\w-]{20,}|"
    r"sk-(?:proj-|ant-(?:api\d\d-)?|svcacct-)?[A-Za-z0-9_-]{20,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|"
    r"AIza[\w-]{35}|ya29\.[\w-]{20,}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|SG\.[\w-]{16,}\.[\w-]{16,}|dop_v1_[0-9a-f]{64}|"
    r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?![A-Za-z0-9_-])"
)
_PEM = re.compile(r"-----BEGIN ((?:[A-Z0-9]+ )*PRIVATE KEY)-----.{0,16384}?(?:-----END \1-----|\Z)", re.DOTALL)
_NAMED_SECRET = re.compile(
    r"(?:secret|token|passw(?:or)?d|api[_-]?key|access[_-]?key|auth|credential)\w{0,20}[\"']?\s*(?:=|:|=>)\s*[\"']?"
    r"([A-Za-z0-9+/_.~-]{16,200}={0,2})",
    re.IGNORECASE,
)
_LEAST_ENTROPY = 3.5  # bits a character


class Found(NamedTuple):
    start: int
    end: int
    kind: str


def luhn(digits: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812-1, annex B)."""
    total = 0
    for i, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + i % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def iban(text: str) -> bool:
    """Country, length and check digits (ISO 7064, mod 97-10) of an account number without spaces."""
    if _IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def entropy(text: str) -> float:
    """Bits a character, by the frequencies within the text."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _emails(text: str) -> Iterator[Found]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Found(match.start(), match.end(), "email")


def _cards(text: str) -> Iterator[Found]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match[0])
        if _ISSUERS.fullmatch(digits) and luhn(digits) and len(set(digits)) > 1:
            yield Found(match.start(), match.end(), "card")


def _ibans(text: str) -> Iterator[Found]:
    for match in _IBAN.finditer(text):
        wanted, end, count = _IBAN_LENGTHS.get(match[0][:2], 0), match.start(), 0
        while count < wanted and end < match.end():  # words in capitals may follow the number
            count += text[end] != " "
            end += 1
        if iban(text[match.start() : end].replace(" ", "")) and not text[end : end + 1].isalnum():
            yield Found(match.start(), end, "iban")


def _ips(text: str) -> Iterator[Found]:
    for match in [*_IP4.finditer(text), *_IP6.finditer(text)]:
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            continue
        if address.is_global and not _VERSION.search(text[max(0, match.start() - 12) : match.start()]):
            yield Found(match.start(), match.end(), "ip")


def _keys(text: str) -> Iterator[Found]:
    for match in _KEYS.finditer(text):
        yield Found(match.start(), match.end(), "key")
    if "PRIVATE KEY" in text:
        for match in _PEM.finditer(text):
            yield Found(match.start(), match.end(), "key")
    for match in _NAMED_SECRET.finditer(text):
        value = match[1]
        kinds = sum(any(map(test, value)) for test in (str.isdigit, str.isupper, str.islower))
        if kinds >= 2 and any(map(str.isdigit, value)) and entropy(value) >= _LEAST_ENTROPY:
            yield Found(match.start(1), match.end(1), "key")


class Phones:
    """regions: countries (ISO 3166, such as US) whose national numbers are found beside international ones, which begin with +."""

    def __init__(self, regions: Iterable[str] = ()) -> None:
        self.regions = tuple(regions)
        unknown = [region for region in self.regions if region not in _phonenumbers().SUPPORTED_REGIONS]
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)} is no region of telephone numbers; a region is a country's two letters, such as US"
            )

    def __call__(self, text: str) -> Iterator[Found]:
        library = _phonenumbers()
        for match in _PHONE.finditer(text):
            number = match[0]
            if not number.startswith("+") and (not self.regions or number.isdigit()):
                continue  # digits alone are more often anything else
            if _DATE.match(number):
                continue
            for region in [None] if number.startswith("+") else self.regions:
                try:
                    parsed = library.parse(number, region)
                except library.NumberParseException:
                    continue
                if library.is_valid_number(parsed) and (
                    region is None or library.is_valid_number_for_region(parsed, region)
                ):
                    yield Found(match.start(), match.end(), "phone")
                    break


def _phonenumbers() -> Any:
    try:
        import phonenumbers
    except ImportError as error:
        raise ImportError(
            'telephone numbers need phonenumbers: pip install "foveate[data]"; or leave out the kind "phone"'
        ) from error
    return phonenumbers


FINDERS: dict[str, Callable[[str], Iterator[Found]]] = {
    "key": _keys, "email": _emails, "iban": _ibans, "card": _cards, "ip": _ips,
}  # fmt: skip
"""In the order of precedence where two overlap; telephone numbers come last."""
PATTERNS: dict[str, tuple[re.Pattern[str], ...]] = {
    "key": (_KEYS, _PEM, _NAMED_SECRET), "email": (_EMAIL,), "iban": (_IBAN,), "card": (_CARD,), "ip": (_IP4, _IP6), "phone": (_PHONE,),
}  # fmt: skip
"""The patterns of each kind: every finding lies within a match, so they tell from where on a growing text may still become one."""
