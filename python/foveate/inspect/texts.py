"""Tokens as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from foveate.tokenizer import Tokenizer


def token_texts(tokenizer: Tokenizer | None, ids: Sequence[int]) -> list[str]:
    """Each token by itself, with the space before it where it has one; "" for -1, "<7>" where the tokenizer has nothing for it."""
    return [_text(tokenizer, token) for token in ids]


def _text(tokenizer: Tokenizer | None, token: int) -> str:
    if token < 0:
        return ""
    if tokenizer is None:
        return f"<{token}>"
    try:
        return tokenizer.id_to_bytes(token).decode("utf-8", "replace")
    except ValueError:  # a row of the embedding beyond the vocabulary
        return f"<{token}>"
