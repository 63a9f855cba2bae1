"""Whatever the pieces in which a text comes, what a guard lets out is the same, and nothing of what it forbids."""

from __future__ import annotations

import random

import pytest

from foveate.guard import Guard, Screen

pytest.importorskip("regex", reason="regex is not installed")

PERSONAL = {"kind": "personal", "action": "redact", "kinds": ["email", "card", "iban", "ip", "key"]}
CARD, IBAN, KEY = "4111 1111 1111 1111", "DE89 3704 0044 0532 0130 00", "ghp_" + "aB3dE6gH9" * 4
TEXT = (
    f"Write to ada.lovelace@example.org, or pay with {CARD}; my account is {IBAN}. The server is 8.8.8.8, version 1.2.3.4. "
    f"password = 'Zx81aB7qLm29Kp30' and {KEY}. In 2024 we had 1234 visitors, 5 of them at 12:30. 卡号是4111111111111111，谢谢。"
)
POLICIES = {
    "personal": [PERSONAL],
    "words": [{"kind": "words", "words": ["the server", "pay", "谢谢"], "action": "redact", "replacement": "***"}],
    "alternatives of different length": [
        {"kind": "pattern", "patterns": ["pay|pay with 4111 1", r"\d{4}(?: \d{4})?(?! \d{4})"], "action": "redact"}
    ],
    "flags": [{**PERSONAL, "action": "flag"}],
    "blocks": [{"kind": "pattern", "patterns": [r"version \d+\.\d+"], "action": "block"}],
    "several": [
        PERSONAL,
        {"kind": "words", "words": ["account", "my account is DE89"], "action": "redact"},
        {"kind": "length", "characters": 200, "on": ["output"]},
        {"kind": "pattern", "patterns": ["visitors"], "action": "flag"},
    ],
}  # fmt: skip


def streamed(guard: Guard, pieces: list[str]) -> tuple[str, Screen]:
    screen = guard.screen("output")
    out = "".join([screen.push(piece) for piece in pieces])
    return out + screen.end(), screen


def cut(text: str, seed: int) -> list[str]:
    """In pieces of 1 to 12 characters."""
    numbers, pieces, at = random.Random(seed), [], 0
    while at < len(text):
        size = numbers.randint(1, 12)
        pieces.append(text[at : at + size])
        at += size
    return pieces


@pytest.mark.parametrize("name", POLICIES)
def test_pieces_and_the_whole_give_the_same(name: str) -> None:
    guard = Guard({"rules": POLICIES[name], "message": "[stopped]"})
    whole = guard.check(TEXT, "output")
    assert whole.findings and (whole.text != TEXT or name == "flags")
    for seed in range(8):
        out, screen = streamed(guard, cut(TEXT, seed) if seed else list(TEXT))
        assert out == whole.text and screen.findings == whole.findings


def test_no_beginning_of_a_forbidden_piece_comes_out() -> None:
    guard = Guard({"rules": [PERSONAL | {"action": "block"}]})
    for secret in ("ada.lovelace@example.org", CARD, IBAN, KEY):
        screen = guard.screen("output")
        out = "".join(screen.push(piece) for piece in "I say: " + secret) + screen.end()
        assert out == "I say: " and screen.blocked is not None and screen.push("more") == ""


def test_random_patterns_leak_nothing() -> None:
    """Against the whole text, for patterns and texts of few letters, where matches overlap and depend on what comes next."""
    numbers = random.Random(3)
    parts = ["a", "b", "ab", "a+", "b{2,4}", "(?:ab|abc)", "c?", "[ac]", "(?!b)", "(?<!c)", "(?=a)", "a|bc"]
    tried = 0
    while tried < 120:
        pattern = "".join(numbers.choices(parts, k=numbers.randint(2, 4)))
        text = "".join(numbers.choices("abc", k=40))
        try:
            guard = Guard(
                {"rules": [{"kind": "pattern", "patterns": [pattern], "action": "redact", "replacement": "_"}]}
            )
        except ValueError:  # it matches the empty text
            continue
        tried += 1
        assert streamed(guard, cut(text, tried))[0] == guard.check(text, "output").text, (pattern, text)


def test_ordinary_text_is_held_back_for_a_word_at_most() -> None:
    screen = Guard({"rules": [PERSONAL]}).screen("output")
    text = "The quick brown fox jumps over the lazy dog, as everybody knows. " * 3
    for letter in text:
        screen.push(letter)
        assert screen.held <= len("everybody") + 1


def test_what_is_undecided_for_too_long_is_blocked() -> None:
    guard = Guard({"rules": [{"kind": "pattern", "patterns": ["begin.*end"], "action": "redact"}], "hold": 64})
    screen = guard.screen("output")
    assert screen.push("so: begin ") == "so: " and screen.push("x" * 100) == ""
    assert screen.blocked is not None and screen.blocked.label == "undecided"
    flags = Guard({"rules": [{"kind": "pattern", "patterns": ["begin.*end"], "action": "flag"}], "hold": 64})
    assert "".join(flags.stream(["begin ", "x" * 100])) == "begin " + "x" * 100


def test_stream_ends_where_a_rule_blocks() -> None:
    guard = Guard({"rules": [{"kind": "words", "words": ["stop here"]}], "message": "(removed)"})
    seen: list[str] = []

    def pieces():
        for piece in ("go on ", "st", "op here, ", "and more"):
            seen.append(piece)
            yield piece

    assert "".join(guard.stream(pieces())) == "go on (removed)" and seen[-1] == "op here, "
    assert "".join(guard.stream(["go on ", "st", "op there"])) == "go on stop there"
