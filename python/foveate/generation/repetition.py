"""Rules about what has come, on log-probabilities of beams: the sampler has its own way for one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
    rows: Sequence[Sequence[int]],
    *,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    end_ids: Sequence[int] = (),
) -> Tensor:
    """log_probs [len(rows), vocab] of the token after each row, changed in place. end_ids: those that must not come yet."""
    forbidden = no_repeat_ngrams(no_repeat_ngram_size) if no_repeat_ngram_size else None
    for scores, row in zip(log_probs, rows):
        if repetition_penalty != 1:
            seen = torch.tensor(sorted(set(row)), device=scores.device)
            values = scores[seen]
            scores[seen] = torch.where(values < 0, values * repetition_penalty, values / repetition_penalty)
        if forbidden is not None and (never := forbidden(row)):
            scores[never] = -torch.inf
    if end_ids:
        log_probs[:, list(end_ids)] = -torch.inf
    return log_probs
