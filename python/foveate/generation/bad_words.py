"""Words that must not come in an output, however tokens spell them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class BadWords:
    """Which tokens would complete one of the words after the text so far. Compared by bytes, so also within tokens and characters."""

    def __init__(self, words: Sequence[str], tokenizer: Any) -> None:
        index = _index(tokenizer)
        encoded = [word.encode() for word in words]
        self._texts = index.texts
        self._longest = max(map(len, encoded))
        self._inside = sorted({token for word in encoded for token in index.containing(word)})
        # {what has come of a word: tokens that begin with its rest}
        self._after: dict[bytes, list[int]] = {}
        for word in encoded:
            for cut in range(1, len(word)):
                self._after.setdefault(word[:cut], []).extend(index.beginning(word[cut:]))

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
            for length in range(1, len(tail) + 1):
                found += self._after.get(tail[-length:], ())
            return found

        return forbidden


class _Index:
    """The bytes of every token, None for special tokens and unused ids, and where bytes are to be found among them."""

    def __init__(self, texts: list[bytes | None]) -> None:
        self.texts = texts
        known = [(text, token) for token, text in enumerate(texts) if text]
        # one text with 0xff, which UTF-8 does not have, between the tokens
        self._whole = b"".join(text + b"\xff" for text, _ in known)
        self._ends = list(itertools.accumulate(len(text) + 1 for text, _ in known))
        self._tokens = [token for _, token in known]
        known.sort()
        self._sorted = [text for text, _ in known]
        self._sorted_tokens = [token for _, token in known]

    def containing(self, word: bytes) -> Iterator[int]:
        """Ids of the tokens that have the word inside."""
        at = self._whole.find(word)
        while at >= 0:
            token = bisect.bisect_right(self._ends, at)
            yield self._tokens[token]
            at = self._whole.find(word, self._ends[token])

    def beginning(self, start: bytes) -> list[int]:
        """Ids of the tokens that begin so."""
        after = start[:-1] + bytes(
            [start[-1] + 1]
        )  # the least text behind those that begin with start; no byte of UTF-8 is 0xff
        first, last = bisect.bisect_left(self._sorted, start), bisect.bisect_left(self._sorted, after)
        return self._sorted_tokens[first:last]


def _index(tokenizer: Any) -> _Index:
    """Made once for a tokenizer."""
    from foveate.generation.detokenizer import special_ids

    index = getattr(tokenizer, "_foveate_token_index", None)
    if index is None:
        special = special_ids(tokenizer)
        size = max(tokenizer.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        texts: list[bytes | None] = [None] * size
        for token in range(size):
            if token not in special and tokenizer.backend.id_to_token(token) is not None:
                texts[token] = tokenizer.id_to_bytes(token)
        index = tokenizer._foveate_token_index = _Index(texts)
    return index
