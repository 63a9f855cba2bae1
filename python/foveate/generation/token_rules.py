"""Which tokens may come next in the output of an encoder-decoder, by transformers' rules of generation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from foveate.generation.repetition import no_repeat_ngrams


class TokenRules:
    """The rules of one output. forced_first, forced_last: the ids of which one must come first, and at the step of number `last`.

    Not before that: end_ids within the first `min_tokens`; a token that would complete an n-gram of no_repeat_ngram_size that the
    target, start token included, has already, or one of source_ngram_size of the source; one that would complete a sequence of
    bad_words; any of `suppressed`. watch: a function of the output so far that gives more of them.
    """

    def __init__(
        self,
        *,
        start: int,
        end_ids: Collection[int] = (),
        min_tokens: int = 0,
        forced_first: Sequence[int] = (),
        forced_last: Sequence[int] = (),
        last: int = -1,
        no_repeat_ngram_size: int = 0,
        source_ngram_size: int = 0,
        source: Sequence[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        suppressed: Sequence[int] = (),
        watch: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> None:
        self._start, self._ends, self._min_tokens = start, sorted(end_ids), min_tokens
        self._first, self._last, self._last_step = list(forced_first), list(forced_last), last
        self._repeated = no_repeat_ngrams(no_repeat_ngram_size) if no_repeat_ngram_size else None
        self._source_ngrams = _ngrams(source, source_ngram_size) if source_ngram_size else None
        self._source_size = source_ngram_size
        # a single end token is no bad word for transformers either: nothing would ever end
        self._bad_words = [tuple(word) for word in bad_words if list(word) not in [[token] for token in self._ends]]
        self._always = [*suppressed, *(word[0] for word in self._bad_words if len(word) == 1)]
        self._watch = watch

    def forced(self, step: int) -> list[int]:
        """The ids of which one must come at this step, from 0; none: any."""
        if step == 0 and self._first:
            return self._first
        return self._last if step == self._last_step else []

    def forbidden(self, output: Sequence[int]) -> list[int]:
        """The ids that must not follow the output, without the start token, where nothing is forced."""
        ids = list(self._always)
        if len(output) < self._min_tokens:
            ids += self._ends
        tokens = [self._start, *output]
        if self._repeated is not None:
            ids += self._repeated(tokens)
        if self._source_ngrams is not None and len(tokens) >= self._source_size - 1:
            beginning = tuple(tokens[len(tokens) - self._source_size + 1 :])
            ids += self._source_ngrams.get(beginning, ())
        for word in self._bad_words:
            if len(word) > 1 and tuple(tokens[len(tokens) - len(word) + 1 :]) == word[:-1]:
                ids.append(word[-1])
        if self._watch is not None:
            ids += self._watch(output)
        return ids


def _ngrams(source: Sequence[int], size: int) -> dict[tuple[int, ...], list[int]]:
    """{the first size - 1 tokens of an n-gram: what follows them}"""
    following: dict[tuple[int, ...], list[int]] = {}
    for at in range(len(source) - size + 1):
        following.setdefault(tuple(source[at : at + size - 1]), []).append(source[at + size - 1])
    return following
