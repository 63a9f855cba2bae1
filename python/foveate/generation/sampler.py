"""Logits to tokens, for a batch in which each row has its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from foveate.generation.params import SamplingParams
from foveate.generation.random_numbers import uniform

_INFINITY = float("inf")
_COLDEST = 1.2e-38  # the smallest normal fp32: below it a temperature would be 0, and 0 / 0
_CANDIDATES = 128  # of the most probable tokens, first looked at for top_k and top_p


class SamplingState:
    """What the sampler knows of one sample: parameters, its tokens, and what its logits go through.

    tokens: the list of prompt and output, which grows outside. end_ids: those that min_tokens forbids. forbidden: None, or
    a callable that takes the output's tokens so far and gives those that must not come next.
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
        forbidden: Callable[[Sequence[int]], Sequence[int]] | None = None,
        mask: Any = None,
    ) -> None:
        self.params, self.tokens, self.prompt_length = params, tokens, len(tokens)
        self.seed, self.sample, self.mask = seed, sample, mask
        self.end_ids, self.forbidden = sorted(end_ids), forbidden
        self.greedy = params.temperature == 0
        self.penalised = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)
        self.processed = bool(self.penalised or params.logit_bias or forbidden or params.min_tokens or mask)
        # Nothing to do but argmax, at any length.
        self.plain = self.greedy and not self.processed and params.logprobs is None
        self.light = self.plain or (not self.processed and params.logprobs is None and params.top_k > 0)
        self.kind = 0 if self.greedy else 2 if params.top_k > 0 or params.top_p < 1 else 1
        self._counts: dict[int, int] = {}  # of the output, for the penalties
        self._counted = self.prompt_length

    def begin_output(self, prompt_length: int) -> None:
        """For `tokens` that have output in them from the beginning."""
        self.prompt_length = self._counted = prompt_length

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
    """Per row the token, -1 where none can be chosen (`no_choice` says why), and None or (token, log-probability, rank) of the chosen
    token, then of the most probable ones."""

    tokens: list[int]
    logprobs: list[list[tuple[int, float, int]] | None]


def sample(logits: Tensor, rows: Sequence[SamplingState]) -> Sampled:
    """The next token of each row from logits [len(rows), vocab], which stay as they are. The order: see SamplingParams."""
    if all(row.plain for row in rows):
        return Sampled(_most_probable(logits), [None] * len(rows))
    # Rows that need no fp32 copy of their logits go together. The others, on a CPU, go one after the other: then their copies stay in the
    # processor's caches, which is twice as fast for 16 rows of 49k.
    light = [i for i, row in enumerate(rows) if row.light or not logits.is_cpu]
    blocks = ([light] if light else []) + [[i] for i, row in enumerate(rows) if i not in light]
    tokens = [-1] * len(rows)
    logprobs: list[list[tuple[int, float, int]] | None] = [None] * len(rows)
    for block in blocks:
        picked = logits if len(block) == len(rows) else logits[block]
        some = _sample_block(picked, [rows[i] for i in block])
        for i, token, alternatives in zip(block, some.tokens, some.logprobs):
            tokens[i], logprobs[i] = token, alternatives
    return Sampled(tokens, logprobs)


def _sample_block(logits: Tensor, rows: Sequence[SamplingState]) -> Sampled:
    work = logits.float()
    if work is logits and any(row.processed for row in rows):
        work = logits.clone()
    for i, row in enumerate(rows):
        if row.processed:
            _process(work[i], row)
    if all(row.greedy for row in rows):
        tokens = _most_probable(work)
    else:
        tokens = [-1] * len(rows)
        for choose, kind in ((_draw_greedy, 0), (_draw_from_all, 1), (_draw_from_candidates, 2)):
            at = [i for i, row in enumerate(rows) if row.kind == kind]
            if at:
                picked = work if len(at) == len(rows) else work[at]
                for i, token in zip(at, choose(picked, [rows[i] for i in at])):
                    tokens[i] = token
    wanted = [None if token < 0 else row.params.logprobs for token, row in zip(tokens, rows)]
    return Sampled(tokens, top_logprobs(logits, [max(token, 0) for token in tokens], wanted))


def _most_probable(logits: Tensor) -> list[int]:
    """-1 for a row with NaN or infinity in it (NaN counts as the largest), or with nothing that is allowed."""
    if logits.is_cpu:  # where torch's argmax takes ten times as long as numpy's; the first of equal ones is both's
        values = logits.detach().float().numpy()
        found = values.argmax(-1)
        chosen = values[numpy.arange(len(values)), found]
        return numpy.where(numpy.isfinite(chosen), found, -1).tolist()
    best = logits.argmax(-1, keepdim=True)
    return best.masked_fill_(~logits.gather(-1, best).isfinite(), -1)[:, 0].tolist()


def no_choice(logits: Tensor, row: SamplingState) -> str:
    """Why `sample` gave -1 for a row, logits [vocab]."""
    if logits.isfinite().all():
        return "no token is allowed to come next: bad_words, min_tokens, logit_bias or the grammar forbid all of them"
    bad = int((~logits.isfinite()).nonzero()[0])
    return f"the model's logits are not finite ({float(logits[bad])} for the token {bad}): its weights are damaged, or they overflow"


def _process(logits: Tensor, row: SamplingState) -> None:
    """Penalties, bias and prohibitions, in place, on one row [vocab]."""
    params = row.params
    if row.penalised:
        _penalise(logits, row)
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=logits.device)
    if row.forbidden is not None and (never := row.forbidden(row.tokens[row.prompt_length :])):
        logits[list(never)] = -_INFINITY
    if len(row.tokens) - row.prompt_length < params.min_tokens and row.end_ids:
        logits[row.end_ids] = -_INFINITY
    if row.mask is not None:
        logits.masked_fill_(~row.mask(), -_INFINITY)


def _penalise(logits: Tensor, row: SamplingState) -> None:
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


def _draw_greedy(logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    return _most_probable(logits)


def _column(values: list[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _invert(weights: Tensor, rows: Sequence[SamplingState]) -> Tensor:
    """Per row the first place whose cumulative weight exceeds the row's random number times the sum. int64 [rows, 1].

    Sums are in fp64: then how torch divides them among threads, which may depend on the batch, does not show.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    target = cumulative[:, -1:] * _column([row.random() for row in rows], weights, torch.float64)
    return torch.searchsorted(cumulative, target, right=True)


def _draw_from_all(logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """Rows that have a temperature and perhaps min_p. logits [rows, vocab]."""
    best = logits.amax(-1, keepdim=True)
    weights = logits - best
    weights.div_(_column([max(row.params.temperature, _COLDEST) for row in rows], logits)).exp_()
    if any(row.params.min_p for row in rows):
        weights.masked_fill_(weights < _column([row.params.min_p for row in rows], logits), 0)
    return _invert(weights, rows).masked_fill_(~best.isfinite(), -1)[:, 0].tolist()


def _draw_from_candidates(logits: Tensor, rows: Sequence[SamplingState]) -> list[int]:
    """Rows that have top_k or top_p too: from the most probable tokens, as many as it takes to have all that are kept.

    Weights are probabilities over the highest one. The kept tokens are put in the order of ids, so that their number and the order of
    ties do not show.
    """
    vocab = logits.shape[1]
    k = [min(row.params.top_k, vocab) if row.params.top_k > 0 else vocab for row in rows]
    limited = [size for size in k if size < vocab]
    best = logits.amax(-1, keepdim=True)
    possible = best.isfinite()
    if not possible.all():
        logits = logits.masked_fill(~possible, 0)
    temperature = _column([max(row.params.temperature, _COLDEST) for row in rows], logits)
    top_p = _column([row.params.top_p for row in rows], logits, torch.float64)
    floor = _column([row.params.min_p for row in rows], logits)
    has_k = torch.tensor([[size < vocab] for size in k], device=logits.device)
    last = torch.tensor([[size - 1] for size in k], device=logits.device)
    total: Tensor | None = None  # weight of all tokens, for rows without top_k
    width = min(vocab, max([_CANDIDATES, *(size + 1 for size in limited)]))
    while True:
        values, ids = logits.topk(width, dim=-1)
        weights = ((values - values[:, :1]) / temperature).exp()
        least = torch.where(has_k, weights.gather(1, last.clamp(max=width - 1)), 0).maximum(floor)
        kept = weights.masked_fill(weights < least, 0).double()
        before = kept.cumsum(-1) - kept
        everything = before[:, -1:] + kept[:, -1:]
        if len(limited) < len(rows):
            if total is None:
                whole = ((logits - values[:, :1]) / temperature).exp_()
                total = whole.masked_fill_(whole < floor, 0).sum(-1, keepdim=True, dtype=torch.float64)
            everything = torch.where(has_k, everything, total)
        count = (before < top_p * everything).sum(-1, keepdim=True)  # in the nucleus
        least = torch.where(top_p < 1, weights.gather(1, count - 1).maximum(least), least)
        if width == vocab or bool((weights[:, -1:] < least).all()):
            break
        width = min(vocab, width * 8)
    ids, order = ids.sort(dim=-1)
    weights = weights.masked_fill_(weights < least, 0).gather(1, order)
    return ids.gather(1, _invert(weights, rows)).masked_fill_(~possible, -1)[:, 0].tolist()


def top_logprobs(
    logits: Tensor, tokens: Sequence[int], wanted: Sequence[int | None]
) -> list[list[tuple[int, float, int]] | None]:
    """Per row (token, log-probability, rank from 1): the given token's, then the `wanted` most probable ones'; None if wanted is None."""
    if all(count is None for count in wanted):
        return [None] * len(tokens)
    wanted = [logits.shape[1] if count == -1 else count for count in wanted]
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    most = min(max(count or 0 for count in wanted), logits.shape[1])
    top = logprobs.topk(most, dim=-1)
    rows: list[list[tuple[int, float, int]] | None] = []
    for i, (token, own, values, ids) in enumerate(
        zip(tokens, chosen[:, 0].tolist(), top.values.tolist(), top.indices.tolist())
    ):
        count = wanted[i]
        best = (
            [] if count is None else [(t, value, rank) for rank, (t, value) in enumerate(zip(ids[:count], values), 1)]
        )
        rows.append(None if count is None else [(token, own, ranks[i]), *best])
    return rows
