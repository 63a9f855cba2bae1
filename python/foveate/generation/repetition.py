"""Rules about what has come, on log-probabilities of beams: the sampler has its own way for one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor


class Rules(Protocol):
    """Those of an output, such as `TokenRules`."""

    def forced(self, step: int) -> list[int]: ...

    def forbidden(self, output: Sequence[int]) -> list[int]: ...


def no_repeat_ngrams(size: int) -> Callable[[Sequence[int]], list[int]]:
    """The tokens that would end an n-gram of `size` tokens which the tokens have already, as transformers' no_repeat_ngram_size."""

    def forbidden(tokens: Sequence[int]) -> list[int]:
        if len(tokens) < size:
            return []
        beginning = tuple(tokens[len(tokens) - size + 1 :])
        places = range(len(tokens) - size + 1)
        return [tokens[at + size - 1] for at in places if tuple(tokens[at : at + size - 1]) == beginning]

    return forbidden


def apply(
    log_probs: Tensor,
    outputs: Sequence[Sequence[int]],
    rules: Sequence[Rules],
    *,
    start: int,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """log_probs [len(outputs), vocab] of the token after each output, changed in place.

    start: the token before each output, which counts for the penalty. A forced token has the log-probability 0.
    """
    for scores, output, rule in zip(log_probs, outputs, rules):
        if repetition_penalty != 1:
            seen = torch.tensor(sorted({start, *output}), device=scores.device)
            values = scores[seen]
            scores[seen] = torch.where(values < 0, values * repetition_penalty, values / repetition_penalty)
        if forced := rule.forced(len(output)):
            scores.fill_(-torch.inf)
            scores[forced] = 0
        elif never := rule.forbidden(output):
            scores[never] = -torch.inf
    return log_probs
