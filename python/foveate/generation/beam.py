"""Beam search: the bookkeeping of hypotheses, for any model that gives log-probabilities step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Hypothesis(NamedTuple):
    tokens: list[int]  # the end-of-sequence token included, if there is one
    score: float  # sum of log-probabilities / len(tokens) ** length_penalty


class BeamSearch:
    """Keeps the `num_beams` most probable continuations of each of `batch` prompts, with the semantics of transformers' generate.

        search = BeamSearch(batch, num_beams, max_new_tokens, eos_ids)
        while not search.done:
            log_probs = ...                       # [batch * num_beams, vocab], of the next token of each beam
            parents, tokens = search.step(log_probs)
            # row i of the next step continues row parents[i] of this one with tokens[i]
        hypotheses = search.results()             # per prompt, best first

    The rows of a prompt are adjacent; before the first step all of them are the prompt itself. Each step keeps the best
    max(2, 1 + len(eos_ids)) * num_beams continuations as candidates. Those among the best num_beams that end (with an eos id, by
    max_new_tokens, or because `stops` is true of their tokens) become hypotheses, scored by
    (sum of log-probabilities) / length ** length_penalty; the best num_beams that do not end go on. A prompt is
    finished when it has num_beams hypotheses and

      early_stopping=True      at once
      early_stopping=False     when the best running beam, scored at its present length, is not better than the worst hypothesis
      early_stopping="never"   the same, scored at the length that helps it most (max_new_tokens for a positive length_penalty)
    """

    def __init__(
        self,
        batch: int,
        num_beams: int,
        max_new_tokens: int,
        eos_ids: set[int] | frozenset[int],
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        stops: Callable[[list[int]], bool] | None = None,
    ) -> None:
        for name, value in {"batch": batch, "num_beams": num_beams, "max_new_tokens": max_new_tokens}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        if early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping={early_stopping!r} must be True, False or "never"')
        self.num_beams, self.max_new_tokens, self.eos_ids = num_beams, max_new_tokens, eos_ids
        self.length_penalty, self.early_stopping, self.stops = length_penalty, early_stopping, stops
        self.length = 0  # tokens generated so far
        self._candidates = max(2, 1 + len(eos_ids)) * num_beams
        self._items = [_Item(num_beams) for _ in range(batch)]

    @property
    def done(self) -> bool:
        return self.length == self.max_new_tokens or all(item.done for item in self._items)

    @property
    def running(self) -> list[list[int]]:
        """The tokens so far of each row of the next step."""
        return [tokens for item in self._items for tokens in item.running]

    def step(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """parents and tokens, int64 [batch * num_beams] on the CPU, from log_probs [batch * num_beams, vocab].

        The rows of a finished prompt go on too, so that the batch keeps its shape; nothing becomes of them.
        """
        batch, K = len(self._items), self.num_beams
        if log_probs.dim() != 2 or log_probs.shape[0] != batch * K:
            raise ValueError(
                f"log_probs has shape {tuple(log_probs.shape)}; it must be [batch * num_beams, vocab] with {batch * K} rows"
            )
        if self.done:
            raise ValueError("the search is done; take results()")
        vocab = log_probs.shape[1]
        running = torch.tensor([item.running_scores for item in self._items], dtype=torch.float32)
        totals = log_probs.float().view(batch, K, vocab) + running.to(log_probs.device)[:, :, None]
        scores, flat = totals.view(batch, K * vocab).topk(min(self._candidates, K * vocab), dim=1)
        self.length += 1
        last = self.length == self.max_new_tokens
        parents, tokens = [], []
        for b, (item, item_scores, item_flat) in enumerate(zip(self._items, scores.tolist(), flat.tolist())):
            candidates = [(score, *divmod(i, vocab)) for score, i in zip(item_scores, item_flat)]
            for parent, token in item.advance(candidates, last, self):
                parents.append(b * K + parent)
                tokens.append(token)
        return torch.tensor(parents), torch.tensor(tokens)

    def results(self, n: int | None = None) -> list[list[Hypothesis]]:
        """The n best hypotheses (num_beams by default) of each prompt, best first."""
        return [item.finished[:n] for item in self._items]


class _Item:
    """The beams and hypotheses of one prompt."""

    def __init__(self, num_beams: int) -> None:
        self.running: list[list[int]] = [[] for _ in range(num_beams)]
        # At first all beams are the same prompt: only the first one counts.
        self.running_scores = [0.0] + [-1e9] * (num_beams - 1)
        self.finished: list[Hypothesis] = []  # best first
        self.done = False

    def advance(
        self, candidates: list[tuple[float, int, int]], last: bool, search: BeamSearch
    ) -> list[tuple[int, int]]:
        """(parent, token) of the beams that go on. candidates: (score, parent, token), best first."""
        K = search.num_beams
        stops = search.stops or (lambda tokens: False)
        ended = [
            last or token in search.eos_ids or stops(self.running[parent] + [token]) for _, parent, token in candidates
        ]
        if not self.done:
            new = [
                Hypothesis(self.running[parent] + [token], score / search.length**search.length_penalty)
                for (score, parent, token), end in zip(candidates[:K], ended)
                if end and score > -1e8  # a copy of the prompt which did not count
            ]
            self.finished = sorted(self.finished + new, key=lambda hypothesis: -hypothesis.score)[:K]
        going_on = [candidate for candidate, end in zip(candidates, ended) if not end]
        going_on = (going_on or candidates)[:K]
        going_on += going_on[-1:] * (K - len(going_on))  # a vocabulary smaller than the number of beams
        self.running = [self.running[parent] + [token] for _, parent, token in going_on]
        self.running_scores = [score for score, _, _ in going_on]
        if len(self.finished) == K:
            length = search.length
            if search.early_stopping == "never" and search.length_penalty > 0:
                length = search.max_new_tokens
            best_possible = self.running_scores[0] / length**search.length_penalty
            self.done = self.done or search.early_stopping is True or best_possible <= self.finished[-1].score
        return [(parent, token) for _, parent, token in going_on]
