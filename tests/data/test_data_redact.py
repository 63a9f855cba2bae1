"""foveate.data.redact: what is found, and above all what is not: dates, ISBNs, version numbers and their like stay."""

from __future__ import annotations

import random
import time

import pytest

import corpus_toys as toys
import foveate.data
from foveate.data.personal import entropy, iban, luhn
from foveate.data.redaction import Redact

WITHOUT_PHONES = ("email", "card", "iban", "ip", "key")


def redacted(text, **options):
    return Redact(**({"kinds": WITHOUT_PHONES} | options)).text(text)[0]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("Write to anna.meyer+news@mail.example.co.uk.", "Write to <EMAIL>."),
        ("<bob@example.com>, or x_y@sub-domain.example.museum!", "<<EMAIL>>, or <EMAIL>!"),
        ("card 4111 1111 1111 1111, exp 12/27", "card <CARD>, exp 12/27"),
        ("5500-0000-0000-0004 and 378282246310005 and 3782 822463 10005", "<CARD> and <CARD> and <CARD>"),
        ("IBAN DE89 3704 0044 0532 0130 00 OF THE FIRM", "IBAN <IBAN> OF THE FIRM"),
        ("GB82WEST12345698765432, FR1420041010050500013M02606", "<IBAN>, <IBAN>"),
        ("from 8.8.8.8 to 2001:4860:4860::8888.", "from <IP> to <IP>."),
        ("AKIAIOSFODNN7EXAMPLE in the code", "<KEY> in the code"),
        ("export TOKEN=ghp_" + "a1B2" * 9, "export TOKEN=<KEY>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----\nafter", "<KEY>\nafter"),
        ('"api_key": "Zx81kQpL0wTr5vBn2mYs"', '"api_key": "<KEY>"'),
        ("password = tr0ub4dor&3", "password = tr0ub4dor&3"),  # too short to be told from a word
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3.SflKxwRJSMeKKF2QT4", "<KEY>"),
    ],
)
def test_what_is_found(text, wanted):
    assert redacted(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "on 2024-03-15 12:30:45, or 15.03.2024, or 20240315123045",
        "ISBN 978-3-16-148410-0 and ISBN-10 0-306-40615-2, ISSN 2049-3630",
        "Python 3.11.7, version 10.0.19045.3803, v1.2.3.4, build 8.8.8.8",
        "10.0.0.1, 192.168.1.20, 127.0.0.1, 255.255.255.255, 300.1.2.3, 1.2.3.4.5 stay; so do ::1 and fe80::1",
        "at 12:30:45, ratio 1:2:3, C++ std::vector<int>, a::b::c, face:feed",
        "3.14159265358979323846 and 1234567890123456 and 0.1234567890123456",
        "4111 1111 1111 1112 has a wrong check digit, 0000 0000 0000 0000 too, 1111222233334444 no issuer",
        "order 49927398716, EAN 4006381333931, IMEI 490154203237518",
        "DE89 3704 0044 0532 0130 01 has wrong check digits; XX82WEST12345698765432 no country; ABCD1234EFGH5678IJKL",
        "sha 2fd4e1c67a2d28fced849ee1bb76e7391b93eb12, commit 36adab0, uuid 123e4567-e89b-12d3-a456-426614174000",
        "the secret of the whole story: everything_was_a_dream; token: the-quick-brown-fox-jumps",
        "user@localhost, @handle, a @ b, 5 @ 3.50, Vector{T}@gpu",
        "100,000,000 people, 1 000 000 000 dollars, § 12.3.4.5, section 1.2.3.4, 50.000.000.000",
        "sk-learn, task-force, hf_hub, AIza, ghp_short",
    ],
)
def test_false_friends_stay(text):
    assert redacted(text) == text


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("call +44 20 7946 0958 or +1 (650) 253-0000.", "call <PHONE> or <PHONE>."),
        ("phone: (650) 253-0000, fax 650.253.0001", "phone: <PHONE>, fax <PHONE>"),
        ("Tel. 030 / 901820 in Berlin", "Tel. <PHONE> in Berlin"),
        ("on 2024-03-15, 15.03.2024, 12:30:45, 1 000 000, 6502530000", "on 2024-03-15, 15.03.2024, 12:30:45, 1 000 000, 6502530000"),
        ("ISBN 978-3-16-148410-0, version 3.11.7.2, 1939-1945", "ISBN 978-3-16-148410-0, version 3.11.7.2, 1939-1945"),
        ("+1 234 and +999 123 456 789 are no numbers", "+1 234 and +999 123 456 789 are no numbers"),
    ],
)  # fmt: skip
def test_telephone_numbers(text, wanted):
    pytest.importorskip("phonenumbers")
    assert redacted(text, kinds=("phone",), regions=("US", "DE")) == wanted


def test_national_numbers_need_a_region():
    pytest.importorskip("phonenumbers")
    assert redacted("(650) 253-0000, +1 650 253 0000", kinds=("phone",)) == "(650) 253-0000, <PHONE>"
    with pytest.raises(ValueError, match="USA is no region of telephone numbers"):
        Redact(regions=("USA",))


def test_check_digits():
    assert luhn("79927398713") and not any(luhn(f"7992739871{d}") for d in "012456789")
    assert iban("BE68539007547034") and not iban("BE68539007547035") and not iban("BE6853900754703") and not iban("")
    assert entropy("aaaa") == 0 and entropy("abcd") == 2
    rng = random.Random(5)
    hits = sum(redacted(f"number {rng.randrange(10**15, 10**16)} here").count("<CARD>") for _ in range(2000))
    assert hits < 100  # of random numbers of 16 digits one in ten has Luhn's digit, and one in five of these an issuer


def test_no_text_is_slow():
    """Each pattern against what could make it try again and again."""
    for piece in (
        "a.",
        "1 ",
        "1-",
        "@",
        "x@",
        "A1",
        "AB12 ",
        ":",
        "1:",
        "((",
        "+",
        "-----BEGIN PRIVATE KEY-----",
        "token=",
        "eyJ.",
        "sk-",
    ):
        began = time.process_time()
        redacted(piece * (40_000 // len(piece)))
        assert time.process_time() - began < 10, piece


def test_the_record_of_what_was_found(tmp_path):
    rows = [{"text": "mail a@b.example to b@c.example"}, {"text": "nothing here"}]
    source = toys.write(tmp_path / "in.jsonl", rows)
    options = {"kinds": WITHOUT_PHONES, "workers": 1, "overwrite": True}
    found = foveate.data.redact(source, tmp_path / "o.jsonl", **options)
    assert toys.read(tmp_path / "o.jsonl") == [{"text": "mail <EMAIL> to <EMAIL>"}, rows[1]]
    assert found["labels"] == {"email": 2} and found["changed"] == 1 and found["removed"] == 0
    assert [row["text"] for row in toys.read(tmp_path / "o.removed.jsonl")] == ["a@b.example", "b@c.example"]
    foveate.data.redact(source, tmp_path / "o.jsonl", values=False, placeholder="[{}]", **options)
    assert toys.read(tmp_path / "o.jsonl")[0] == {"text": "mail [EMAIL] to [EMAIL]"}
    assert "a@b" not in (tmp_path / "o.removed.jsonl").read_text()
    with pytest.raises(ValueError, match="with values=False there is none"):
        foveate.data.redact(source, tmp_path / "o.jsonl", values=False, report=tmp_path / "r.html", **options)
    with pytest.raises(ValueError, match="there is no kind mail; the kinds are email, phone"):
        foveate.data.redact(source, tmp_path / "p.jsonl", kinds=["mail"])
