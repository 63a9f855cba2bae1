"""Tokens to text, piece by piece, without splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any


class Detokenizer:
    """The text of a growing list of tokens: the pieces together are the decoding of all of them.

    A token may end within a UTF-8 character; its bytes wait until the character is complete. Bytes that are no UTF-8 become U+FFFD.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._id_to_bytes = tokenizer.id_to_bytes
        self._skipped = special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; it may be empty."""
        if token in self._skipped:
            return ""
        try:
            return self._utf8.decode(self._id_to_bytes(token))
        except ValueError:  # a row of the model's embedding beyond the vocabulary: `decode` has nothing for it either
            return ""

    def hidden(self, token: int) -> str:
        """The text of a special token that `push` leaves out, "" for others."""
        return self._id_to_bytes(token).decode("utf-8", "replace") if token in self._skipped else ""

    def flush(self) -> str:
        """What waits for more bytes, at the end."""
        return self._utf8.decode(b"", True)


def detokenize(tokenizer: Any, tokens: Iterable[int], skip_special_tokens: bool = True) -> str:
    """The text that a sample of these tokens has; the space that SentencePiece's first token begins with is part of it."""
    reader = Detokenizer(tokenizer, skip_special_tokens)
    return "".join([reader.push(token) for token in tokens]) + reader.flush()


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids which `decode` leaves out."""
    ids = getattr(tokenizer, "_foveate_special_ids", None)
    if ids is None:
        added = tokenizer.backend.get_added_tokens_decoder()
        ids = frozenset(token for token, entry in added.items() if entry.special)
        tokenizer._foveate_special_ids = ids
    return ids
