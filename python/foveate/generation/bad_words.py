"""Words that must not come in an output, however tokens spell them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class BadWords:
    """Which tokens would complete one of the words after the text so far. Compared by bytes, so also within tokens and characters."""

    def __init__(self, words: Sequence[str], tokenizer: Any) -> None:
        texts = _token_bytes(tokenizer)
        self._words = [word.encode() for word in words]
        self._texts = texts
        self._longest = max(map(len, self._words))
        self._inside = sorted(
            {i for i, text in enumerate(texts) for word in self._words if text is not None and word in text}
        )
        # {what has come of a word: tokens that begin with its rest}
        self._after: dict[bytes, list[int]] = {}
        for word in self._words:
            for cut in range(1, len(word)):
                rest = word[cut:]
                found = [i for i, text in enumerate(texts) if text is not None and text.startswith(rest)]
                self._after.setdefault(word[:cut], []).extend(found)

    def watch(self) -> Callable[[Sequence[int]], list[int]]:
        """A function of the output's tokens so far, which only grow: the tokens that must not come next."""
        tail = b""
        read = 0

        def forbidden(tokens: Sequence[int]) -> list[int]:
            nonlocal tail, read
            for token in tokens[read:]:
                text = self._texts[token] if token < len(self._texts) else None
                tail = (tail + (text or b""))[-self._longest :]
            read = len(tokens)
            found = list(self._inside)
            for begun, next_tokens in self._after.items():
                if tail.endswith(begun):
                    found += next_tokens
            return found

        return forbidden


def _token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of every token, None for special tokens and unused ids; read once for a tokenizer."""
    from foveate.generation.detokenizer import special_ids

    found = getattr(tokenizer, "_foveate_token_bytes", None)
    if found is None:
        special = special_ids(tokenizer)
        size = max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        found = [None] * size
        for token in range(size):
            if token not in special and tokenizer.backend.id_to_token(token) is not None:
                found[token] = tokenizer.id_to_bytes(token)
        tokenizer._foveate_token_bytes = found
    return found
