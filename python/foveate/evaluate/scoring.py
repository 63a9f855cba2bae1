"""Log-likelihoods of given continuations: shared beginnings are computed once, and continuations of many contexts in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from foveate.cache.paged import CacheFull
from foveate.cache.view import CacheView
from foveate.generation.llm import LLM

_ROWS = 512  # tokens of continuations in one pass
_LOGIT_ROWS = 256  # of which logits are there at once


class Scored(NamedTuple):
    """logprobs: of each token of the continuation, natural logarithms. greedy: whether each is the most probable one."""

    logprobs: list[float]
    greedy: bool

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class _Row(NamedTuple):
    """One request on its way: the cached sequence, which has all before inputs; targets are what comes after each of them."""

    number: int
    seq: int
    have: int
    inputs: list[int]
    targets: list[int]


class Scorer:
    """For one LLM, whose cache it shares with requests that run.

    Equal to one forward pass over each request by itself, up to the rounding of another order of sums.
    """

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @torch.inference_mode()
    def score(
        self,
        requests: Sequence[tuple[Sequence[int], Sequence[int]]],
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Scored]:
        """For each (context, continuation) of token ids. The context has at least one token; an empty continuation gives no numbers.

        What is longer than the model's context loses its first tokens, as in lm-evaluation-harness. ValueError where a continuation
        alone is longer. advance: called with the number of requests that are done since the last time.
        """
        longest = self.llm.max_model_len
        vocab = self.llm.engine.model.config.vocab_size
        whole: list[tuple[list[int], int]] = []
        for context, continuation in requests:
            if not context:
                raise ValueError("a context is empty; it needs at least one token, such as the beginning-of-text token")
            if len(continuation) > longest:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens and the context {longest}; cut it, or measure it as rolling text"
                )
            tokens = [*context, *continuation][-(longest + 1) :]
            if not all(0 <= token < vocab for token in tokens):
                raise ValueError(f"a request has a token id that is not from 0 to {vocab - 1}")
            whole.append((tokens, len(continuation)))
        found: list[Scored] = [Scored([], True)] * len(whole)
        with self.llm.engine.lock:
            _Pass(self.llm, whole, found, advance).run()
        return found


class _Pass:
    """Requests in the order of their tokens, so that neighbours share the most; one chain of cached beginnings at a time."""

    def __init__(
        self, llm: LLM, whole: list[tuple[list[int], int]], found: list[Scored], advance: Callable[[int], None]
    ) -> None:
        self._llm, self._whole, self._found, self._advance = llm, whole, found, advance
        self._cache = llm.engine.cache
        self._held: int | None = None  # a sequence that has the tokens of `_tokens`
        self._tokens: list[int] = []
        self._waiting: list[_Row] = []

    def run(self) -> None:
        order = [i for i, (_, count) in enumerate(self._whole) if count]
        order.sort(key=lambda i: self._whole[i][0])
        for _, count in self._whole:
            if not count:
                self._advance(1)
        shared = [*itertools.starmap(self._common, itertools.pairwise(order)), 0]
        before = 0
        try:
            for i, after in zip(order, shared):
                self._add(i, max(before, after))
                before = after
            self._flush()
        finally:
            for row in self._waiting:
                self._cache.free(row.seq)
            self._drop()

    def _common(self, a: int, b: int) -> int:
        """How many tokens before the continuation of either they have in common."""
        (x, m), (y, n) = self._whole[a], self._whole[b]
        most = min(len(x) - m, len(y) - n) - 1
        return next((at for at in range(most) if x[at] != y[at]), max(0, most))

    def _add(self, index: int, shared: int) -> None:
        """shared: tokens of its beginning that a neighbour has, too, and so are computed by themselves."""
        tokens, count = self._whole[index]
        ready = self._hold(tokens[:shared])
        inputs = tokens[ready:-1]
        if len(inputs) > _ROWS:  # a long one: all but what is scored beforehand, in parts
            ready = self._hold(tokens[: max(ready, len(tokens) - 1 - count)])
            inputs = tokens[ready:-1]
        if self._waiting and (
            sum(len(row.inputs) for row in self._waiting) + len(inputs) > _ROWS or self._uneven(inputs)
        ):
            self._flush()
        self._room(len(inputs))
        if self._held is None:  # it gave way
            ready = self._hold(tokens[:ready])
        seq = self._cache.create() if self._held is None else self._cache.fork(self._held, ready)
        self._waiting.append(_Row(index, seq, ready, inputs, tokens[len(tokens) - count :]))

    def _uneven(self, inputs: list[int]) -> bool:
        """Whether more than half of the tokens of the pass would be padding."""
        lengths = [len(row.inputs) for row in self._waiting] + [len(inputs)]
        return max(lengths) * len(lengths) > 2 * sum(lengths) + 64

    def _hold(self, tokens: list[int]) -> int:
        """Makes `_held` a sequence that begins with these tokens; how many they are."""
        same = 0
        for a, b in zip(tokens, self._tokens):
            if a != b:
                break
            same += 1
        if same == len(tokens) and self._held is not None:
            return same
        self._room(len(tokens) - same)
        same = 0 if self._held is None else same
        old, self._held = self._held, self._cache.create() if self._held is None else self._cache.fork(self._held, same)
        if old is not None:
            self._cache.free(old)
        self._tokens = tokens[:same]
        step = self._llm.engine.scheduler.max_prefill_tokens
        for at in range(same, len(tokens), step):
            part = tokens[at : at + step]
            self._append(self._held, len(part))
            self._hidden([part], [self._held])
            self._tokens = tokens[: at + len(part)]
        return len(tokens)

    def _pages(self, new: int) -> int:
        """At most, for so many more tokens of one sequence whose last page may be shared."""
        return new // self._cache.page_size + 2

    def _room(self, new: int) -> None:
        """Flushes where what waits would no longer fit beside `new` tokens of another sequence."""
        needed = sum(self._pages(len(row.inputs)) for row in self._waiting) + self._pages(new)
        if self._waiting and needed > self._cache.free_pages + self._cache.held_only:
            self._flush()

    def _append(self, seq: int, new: int) -> None:
        """For a sequence alone; the beginning that is kept for the next ones gives way to it."""
        try:
            self._llm.engine.append([seq], new)
        except CacheFull:
            if self._held is None or self._held == seq:
                raise
            self._drop()
            self._llm.engine.append([seq], new)

    def _hidden(self, inputs: list[list[int]], seqs: list[int]) -> Tensor:
        ids = torch.tensor(inputs, device=self._llm.device)
        return self._llm.model.hidden(ids, CacheView(self._cache, seqs, ids.shape[1]))

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        try:
            while rows:
                batch, rows = self._fitting(rows)
                self._run(batch)
        except BaseException:
            for row in rows:
                self._cache.free(row.seq)
            raise

    def _fitting(self, rows: list[_Row]) -> tuple[list[_Row], list[_Row]]:
        """As many as the cache has room for, and as do not go beyond the model's positions when they are made equally long."""
        limit, count = self._llm.max_model_len, 1
        for count in range(len(rows), 1, -1):
            longest = max(len(row.inputs) for row in rows[:count])
            pages = count * (longest // self._cache.page_size + 2)
            free = self._cache.free_pages + self._cache.held_only
            if pages <= free and all(row.have + longest <= limit for row in rows[:count]):
                return rows[:count], rows[count:]
        return rows[:1], rows[1:]

    def _run(self, rows: list[_Row]) -> None:
        try:
            if len(rows) == 1:
                self._long(rows[0])
            else:
                longest = max(len(row.inputs) for row in rows)
                seqs = [row.seq for row in rows]
                self._llm.engine.append(seqs, longest)
                hidden = self._hidden([row.inputs + [0] * (longest - len(row.inputs)) for row in rows], seqs)
                kept = [hidden[i, len(row.inputs) - len(row.targets) : len(row.inputs)] for i, row in enumerate(rows)]
                logprobs, best = self._targets(torch.cat(kept), [t for row in rows for t in row.targets])
                at = 0
                for row in rows:
                    end = at + len(row.targets)
                    self._found[row.number] = Scored(logprobs[at:end], all(best[at:end]))
                    at = end
        finally:
            for row in rows:
                self._cache.free(row.seq)
        self._advance(len(rows))

    def _long(self, row: _Row) -> None:
        step = self._llm.engine.scheduler.max_prefill_tokens
        logprobs: list[float] = []
        best: list[bool] = []
        skip = len(row.inputs) - len(row.targets)
        for at in range(0, len(row.inputs), step):
            part = row.inputs[at : at + step]
            self._append(row.seq, len(part))
            hidden = self._hidden([part], [row.seq])[0]
            first = max(at, skip)
            if first < at + len(part):
                found = self._targets(hidden[first - at :], row.targets[first - skip : at + len(part) - skip])
                logprobs += found[0]
                best += found[1]
        self._found[row.number] = Scored(logprobs, all(best))

    def _targets(self, hidden: Tensor, targets: list[int]) -> tuple[list[float], list[bool]]:
        logprobs: list[float] = []
        best: list[bool] = []
        for at in range(0, len(targets), _LOGIT_ROWS):
            wanted = torch.tensor(targets[at : at + _LOGIT_ROWS], device=hidden.device)
            logits = self._llm.model.logits(hidden[at : at + _LOGIT_ROWS]).float()
            chosen = logits.gather(1, wanted[:, None])[:, 0]
            logprobs += (chosen - logits.logsumexp(-1)).tolist()
            best += (logits.argmax(-1) == wanted).tolist()
        return logprobs, best

    def _drop(self) -> None:
        if self._held is not None:
            self._cache.free(self._held)
            self._held, self._tokens = None, []
