"""Logits to tokens, for a batch in which each row has its own parameters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.generation.params import SamplingParams
from foveate.generation.random_numbers import uniform

_INFINITY = float("inf")
_CANDIDATES = 128  # of the most probable tokens, first looked at for top_k and top_p


class Row:
    """What the sampler knows of one sample: parameters, its tokens, and what its logits go through.

    tokens: the list of prompt and output, which grows outside. end_ids: those that min_tokens forbids. bad_words: token lists.
    mask: None, or a callable that gives a bool tensor [vocab], True for the tokens that the grammar allows now.
    """

    def __init__(
        self,
        params: SamplingParams,
        tokens: list[int],
        *,
        seed: int = 0,
        sample: int = 0,
        end_ids: Collection[int] = (),
        bad_words: Sequence[Sequence[int]] = (),
        mask: Any = None,
    ) -> None:
        self.params, self.tokens, self.prompt_length = params, tokens, len(tokens)
        self.seed, self.sample, self.mask = seed, sample, mask
        self.end_ids, self.bad_words = sorted(end_ids), bad_words
        self.greedy = params.temperature == 0
        self.penalised = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
        # Nothing to do but argmax, at any length.
        self.plain = self.greedy and not (
            self.penalised or params.logit_bias or bad_words or params.min_tokens or mask or params.logprobs is not None
        )
        self._counts: dict[int, int] = {}  # of the output, for the penalties
        self._counted = self.prompt_length

    def counts(self) -> dict[int, int]:
        """How often each token is in the output."""
        for token in self.tokens[self._counted :]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._counted = len(self.tokens)
        return self._counts

    def random(self) -> float:
        """The number that decides the token at the end of `tokens`."""
        return uniform(self.seed, self.sample, len(self.tokens))


class Sampled(NamedTuple):
    tokens: list[int]
    logprobs: list[
        list[tuple[int, float, int]] | None
    ]  # per row (token, log-probability, rank): the chosen, then the most probable


def sample(logits: Tensor, rows: Sequence[Row]) -> Sampled:
    """The next token of each row from logits [len(rows), vocab], which stay as they are. The order: see SamplingParams."""
    if all(row.plain for row in rows):
        return Sampled(logits.argmax(-1).tolist(), [None] * len(rows))
    # On a CPU one row after the other: its fp32 copies stay in the caches, 2 times as fast as together for 16 rows of 49k.
    block = 1 if logits.is_cpu else len(rows)
    tokens: list[int] = []
    logprobs: list[list[tuple[int, float, int]] | None] = []
    for at in range(0, len(rows), block):
        some = _sample_block(logits[at : at + block], rows[at : at + block])
        tokens += some.tokens
        logprobs += some.logprobs
    return Sampled(tokens, logprobs)


def _sample_block(logits: Tensor, rows: Sequence[Row]) -> Sampled:
    raw = logits.float()
    work = raw.clone() if raw is logits else raw
    for i, row in enumerate(rows):
        _process(work[i], row)
    tokens = work.argmax(-1).tolist()
    drawn = [i for i, row in enumerate(rows) if not row.greedy]
    if drawn:
        picked = work if len(drawn) == len(rows) else work[drawn]
        for i, token in zip(drawn, _draw(picked, [rows[i] for i in drawn])):
            tokens[i] = token
    return Sampled(tokens, top_logprobs(logits, tokens, [row.params.logprobs for row in rows]))


def _process(logits: Tensor, row: Row) -> None:
    """Penalties, bias and prohibitions, in place, on one row [vocab]."""
    params = row.params
    if row.penalised:
        _penalise(logits, row)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=logits.device)
    for word in row.bad_words:
        *before, last = word
        if not before or row.tokens[-len(before) :] == before:
            logits[last] = -_INFINITY
    if len(row.tokens) - row.prompt_length < params.min_tokens and row.end_ids:
        logits[row.end_ids] = -_INFINITY
    if row.mask is not None:
        logits.masked_fill_(~row.mask(), -_INFINITY)


def _penalise(logits: Tensor, row: Row) -> None:
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(list(set(row.tokens)), device=logits.device)
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    counts = row.counts()
    if counts and (params.frequency_penalty or params.presence_penalty):
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits.device)
        logits[ids] -= params.frequency_penalty * times + params.presence_penalty


def _draw(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """One token for each row by its temperature, min_p, top_k, top_p and random number; overwrites logits [rows, vocab].

    The token is the first whose cumulative probability, in the order of ids, exceeds the random number. Sums are in fp64: then how
    torch divides them among threads, which depends on the batch, does not show.
    """
    device = logits.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    logits /= column([row.params.temperature for row in rows])
    logits -= logits.amax(-1, keepdim=True)
    weights = logits.exp()
    least = _least_weight(weights, rows)
    if least is not None:
        weights.masked_fill_(weights < least, 0)
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = cumulative[:, -1:] * torch.tensor([[row.random()] for row in rows], dtype=torch.float64, device=device)
    return torch.searchsorted(cumulative, target, right=True)[:, 0].tolist()


def _least_weight(weights: Tensor, rows: Sequence[Row]) -> Tensor | None:
    """[rows, 1], the smallest weight (probability over the highest one) that min_p, top_k and top_p keep; None if all keep all."""
    device, vocab = weights.device, weights.shape[1]
    k = [min(row.params.top_k, vocab) if row.params.top_k > 0 else vocab for row in rows]
    p = [row.params.top_p for row in rows]
    floor = torch.tensor([[row.params.min_p] for row in rows], dtype=torch.float32, device=device)
    if min(k) == vocab and min(p) == 1:
        return floor if any(row.params.min_p for row in rows) else None
    limited = [size for size in k if size < vocab]
    width = min(vocab, max([_CANDIDATES, *limited]))
    kept = torch.tensor([[size < vocab] for size in k], device=device)
    last = torch.tensor([[size - 1] for size in k], device=device)
    top_p = torch.tensor([[x if x < 1 else 2.0] for x in p], dtype=torch.float64, device=device)
    while True:
        candidates = weights.topk(width, dim=-1).values
        kth = torch.where(kept, candidates.gather(1, last.clamp(max=width - 1)), 0)
        least = torch.maximum(floor, kth)
        if min(p) == 1:
            return least
        total = weights.masked_fill(weights < least, 0).sum(-1, keepdim=True, dtype=torch.float64)
        inside = candidates.double().masked_fill(candidates < least, 0)
        before = inside.cumsum(-1) - inside
        count = (before < top_p * total).sum(-1, keepdim=True)
        enough = (count < width) | (top_p > 1)
        if width == vocab or bool(enough.all()):
            nucleus = candidates.gather(1, count - 1)
            return torch.where(top_p > 1, least, torch.maximum(least, nucleus))
        width = min(vocab, width * 8)


def top_logprobs(
    logits: Tensor, tokens: Sequence[int], wanted: Sequence[int | None]
) -> list[list[tuple[int, float, int]] | None]:
    """Per row (token, log-probability, rank from 1): the given token's, then the `wanted` most probable ones'; None if wanted is None."""
    if all(count is None for count in wanted):
        return [None] * len(tokens)
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    most = min(max(count or 0 for count in wanted), logits.shape[1])
    top = logprobs.topk(most, dim=-1)
    found: list[list[tuple[int, float, int]] | None] = []
    for i, (token, own, values, ids) in enumerate(
        zip(tokens, chosen[:, 0].tolist(), top.values.tolist(), top.indices.tolist())
    ):
        count = wanted[i]
        best = (
            [] if count is None else [(t, value, rank) for rank, (t, value) in enumerate(zip(ids[:count], values), 1)]
        )
        found.append(None if count is None else [(token, own, ranks[i]), *best])
    return found
