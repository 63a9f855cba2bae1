"""A request and its samples: what they have so far, and when they end."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

import torch

from foveate.generation.bad_words import BadWords
from foveate.generation.detokenizer import Detokenizer, detokenize
from foveate.generation.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from foveate.generation.params import SamplingParams
from foveate.generation.prefix_cache import Node
from foveate.generation.prompt_lookup import PromptLookup
from foveate.generation.sampler import SamplingState
from foveate.generation.stops import StopStrings


class Request:
    """One prompt with its parameters. `priority`, lower first, and then `arrival` order requests."""

    def __init__(
        self, id: str, prompt: str | None, tokens: Sequence[int], params: SamplingParams, *, arrival: int, max_length: int,
        eos_ids: Collection[int], tokenizer: Any, grammar: Any, stream: bool, priority: tuple[float, float] = (0.0, 0.0),
        adapter: Any = None, salt: str = "",
    ) -> None:  # fmt: skip
        self.id, self.prompt, self.tokens, self.params = id, prompt, list(tokens), params
        self.arrival, self.max_length, self.stream, self.tokenizer = arrival, max_length, stream, tokenizer
        self.priority, self.adapter, self.salt = priority, adapter, salt
        self.eos_ids = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self.stop_ids = frozenset(params.stop_token_ids or ())
        self.bad_words = BadWords(params.bad_words, tokenizer) if params.bad_words else None
        self.seed = int(torch.randint(2**62, (), dtype=torch.int64)) if params.seed is None else params.seed
        # best_of ranks by the sum of log-probabilities, so it needs them
        self.ranked = params.samples > params.n
        self.sampler_params = params.with_(logprobs=0) if self.ranked and params.logprobs is None else params
        self.prompt_logprobs: list[dict[int, Logprob] | None] = [None] * len(tokens)
        self.metrics = RequestMetrics(time.perf_counter())
        self.samples = [Sample(self, i, grammar) for i in range(params.samples)]

    @property
    def finished(self) -> bool:
        return all(sample.finish_reason is not None for sample in self.samples)

    def describe(self, candidates: Sequence[tuple[int, float, int]]) -> dict[int, Logprob]:
        text = (
            (lambda token: "") if self.tokenizer is None else (lambda token: detokenize(self.tokenizer, [token], False))
        )
        return {token: Logprob(value, rank, text(token)) for token, value, rank in candidates}

    def output(self) -> RequestOutput:
        samples = self.samples
        finished = self.finished
        if self.ranked and finished:
            samples = sorted(samples, key=lambda sample: -sample.cumulative_logprob)[: self.params.n]
        return RequestOutput(
            request_id=self.id,
            prompt=self.prompt,
            prompt_token_ids=self.tokens,
            prompt_logprobs=None if self.params.prompt_logprobs is None else self.prompt_logprobs,
            outputs=[sample.output(i) for i, sample in enumerate(samples)],
            finished=finished,
            metrics=self.metrics,
        )


class Sample:
    """One sequence of a request. `tokens` (prompt and output) is all that must survive a preemption.

    cached: how many of the tokens have their keys in the cache, as sequence `seq`. A sample that is up to date has cached ==
    len(tokens) - 1: the last token is the input of the next step.
    """

    def __init__(self, request: Request, index: int, grammar: Any) -> None:
        params = request.params
        self.request, self.index = request, index
        self.tokens = list(request.tokens)
        self.prompt_length = len(self.tokens)
        self.seq: int | None = None
        self.cached = 0
        self.node: Node | None = None  # of the last full page in the prefix cache
        self.registered = 0  # full pages in the prefix cache
        self.matcher = None if grammar is None else grammar.matcher()
        self.sampling = SamplingState(
            request.sampler_params, self.tokens, seed=request.seed, sample=index, end_ids=request.eos_ids | request.stop_ids,
            forbidden=None if request.bad_words is None else request.bad_words.watch(),
            mask=None if self.matcher is None else self.matcher.allowed,
        )  # fmt: skip
        self.detokenizer = (
            None if request.tokenizer is None else Detokenizer(request.tokenizer, params.skip_special_tokens)
        )
        self.stops = StopStrings(params.stop_strings, params.include_stop_str_in_output)
        self.lookup = PromptLookup() if params.prompt_lookup else None
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, Logprob]] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    @property
    def priority(self) -> tuple[float, float, int, int]:
        return *self.request.priority, self.request.arrival, self.index

    @property
    def sequence(self) -> int:
        """Its sequence in the cache, which a sample that waits has not."""
        if self.seq is None:
            raise RuntimeError(
                f"sample {self.index} of request {self.request.id} waits, so it has no sequence in the cache"
            )
        return self.seq

    @property
    def started(self) -> bool:
        """Whether it has output."""
        return len(self.tokens) > self.prompt_length

    def draft(self) -> list[int]:
        if self.lookup is None:
            return []
        room = self.request.max_length - len(self.tokens) - 1  # the step gives one token more than it accepts
        return self.lookup.draft(self.tokens, min(self.request.params.prompt_lookup, room)) if room > 0 else []

    def fail(self, reason: str) -> None:
        """Ends this sample, and nobody else's, with what it has."""
        self.finish_reason, self.stop_reason = "abort", reason
        if self.detokenizer is not None:
            self.stops.push(self.detokenizer.flush(), False)

    def accept(self, token: int, logprobs: list[tuple[int, float, int]] | None) -> None:
        """Appends a token and finds out whether it is the last."""
        request = self.request
        self.tokens.append(token)
        if logprobs is not None:
            self.cumulative_logprob += logprobs[0][1]
            if request.params.logprobs is not None:
                self.logprobs.append(request.describe(logprobs))
        may_stop = len(self.tokens) - self.prompt_length >= request.params.min_tokens
        if self.matcher is not None and self.matcher.consume(token):
            self.finish_reason = "stop"
        if token in request.eos_ids:
            self.finish_reason = "stop"
        elif token in request.stop_ids and may_stop:
            self.finish_reason, self.stop_reason = "stop", token
        elif len(self.tokens) >= request.max_length and self.finish_reason is None:
            self.finish_reason = "length"
        if self.matcher is not None and self.matcher.error is not None:
            self.finish_reason, self.stop_reason = "abort", self.matcher.error
        if self.detokenizer is not None:
            self._read(self.detokenizer, token, may_stop)

    def _read(self, detokenizer: Detokenizer, token: int, may_stop: bool) -> None:
        """The text of the token, and the stop strings in it."""
        ended_by_id = self.finish_reason == "stop" and self.matcher is None
        piece = ""
        if not ended_by_id or (self.request.params.include_stop_str_in_output and self.stop_reason is not None):
            piece = detokenizer.push(token)
        if self.finish_reason is not None:
            piece += detokenizer.flush()
        stop = self.stops.push(piece, may_stop)
        if not stop and not ended_by_id and self.request.params.stop_strings:
            stop = self.stops.push(detokenizer.hidden(token), may_stop, hidden=True)
        if stop:
            self.finish_reason, self.stop_reason = "stop", self.stops.found

    def output(self, index: int) -> CompletionOutput:
        """With the text that nothing can take back any more."""
        text = self.stops.text
        asked = self.request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=text if self.finish_reason is not None else text[: self.stops.safe],
            token_ids=self.tokens[self.prompt_length :],
            cumulative_logprob=self.cumulative_logprob if asked or self.request.ranked else None,
            logprobs=self.logprobs if asked else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
