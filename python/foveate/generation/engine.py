"""The engine: requests join and leave between steps of one model on one paged cache."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.cache.paged import CacheFull, PagedKVCache
from foveate.cache.view import CacheView
from foveate.files.locked import locked
from foveate.generation.constrained import Grammar, GrammarCompiler
from foveate.generation.decode_graph import DecodeGraph
from foveate.generation.draft_model import DraftModel
from foveate.generation.lora import Adapters, modules_of
from foveate.generation.outputs import RequestOutput
from foveate.generation.params import SamplingParams
from foveate.generation.request import Request, Sample
from foveate.generation.sampler import no_choice, top_logprobs
from foveate.generation.sampler import sample as sample_tokens
from foveate.generation.scheduler import Group, Scheduler


@dataclass
class EngineStats:
    """Since the engine was made. Times in seconds; a step with prompt tokens in it counts as prefill, the others as decode."""

    steps: int = 0
    prefill_tokens: int = 0  # computed, so without those that the prefix cache had
    prefill_time: float = 0.0
    decode_tokens: int = 0  # chosen in decode steps
    decode_time: float = 0.0
    cached_tokens: int = 0  # of prompts, that the prefix cache had
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of those
    preemptions: int = 0


class _Ready(NamedTuple):
    """A sample whose next token comes from this row of the step's logits, and, while they are right, its drafts from those after it."""

    sample: Sample
    logits_row: int
    draft: list[int]


class Engine:
    """Continuous batching of any number of requests.

        engine = Engine(model, cache, tokenizer=tokenizer, eos_ids=tokenizer.eos_ids)
        engine.add("a", prompt_ids, SamplingParams(max_tokens=20))
        while engine.has_work:
            for output in engine.step():
                ...

    model: has config, hidden(tokens, cache) and logits(hidden), as foveate.models' causal models and NativeDecoder have.
    cache: a PagedKVCache that nothing else uses. max_length: tokens of prompt and output together, the model's max_positions by default.
    max_batch: samples that run at once. max_prefill_tokens: prompt tokens in one step, between which the others decode.
    decode: a DecodeGraph of this model and cache, for the groups of a step with one token per sample and no drafts.
    draft: a smaller model that guesses what this one then checks.

    The tokens of a request depend on its prompt, parameters and seed alone: not on other requests, on chunks, on drafts, on preemption,
    or on what of the prompt is cached. A prompt that repeats an earlier reply is the exception: the reply's keys are those of the steps
    that generated it, whose attention rounds otherwise than a prompt's.
    A request whose tokens cannot be chosen, as the logits are NaN or all are forbidden, ends with "abort" and the reason; others go on.
    Several threads may call at once: one after the other holds `lock` for the whole call.
    For floating point that takes a model whose rows do not depend on their batch, as those on PackedLinear; with torch's matrix products
    a row may differ in its last bits.
    """

    def __init__(
        self,
        model: Any,
        cache: PagedKVCache,
        *,
        tokenizer: Any = None,
        eos_ids: Collection[int] = (),
        max_length: int | None = None,
        max_batch: int = 64,
        max_prefill_tokens: int = 512,
        enable_prefix_caching: bool = True,
        decode: DecodeGraph | None = None,
        draft: DraftModel | None = None,
    ) -> None:
        if decode is not None and (decode.model is not model or decode.cache is not cache):
            raise ValueError(
                "decode was made for another model or cache; use DecodeGraph(model, cache) of this engine's"
            )
        for name, value in {"max_batch": max_batch, "max_prefill_tokens": max_prefill_tokens}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be 1 or more")
        self.model, self.cache, self.tokenizer = model, cache, tokenizer
        self.adapters = Adapters(modules_of(model))
        # files name ids that the model's head does not have, and so never chooses
        self.eos_ids = frozenset(token for token in eos_ids if 0 <= token < model.config.vocab_size)
        self.max_length = min(max_length or model.config.max_positions, model.config.max_positions)
        self.scheduler = Scheduler(
            cache, max_batch=max_batch, max_prefill_tokens=max_prefill_tokens, prefix_caching=enable_prefix_caching,
            max_length=self.max_length, draft=draft,
        )  # fmt: skip
        self.device = cache.k_pages.device
        self.lock = threading.RLock()
        self.decode = decode
        self.num_pages = cache.num_pages - (
            0 if decode is None else 1
        )  # that sequences can have: a DecodeGraph keeps one
        self._requests: dict[str, Request] = {}
        self._grammars = GrammarCompiler(tokenizer, model.config.vocab_size)
        self._arrivals = 0
        self.stats = EngineStats()
        # Called in a step with the logits, and for each sample its row of them, its token (-1: none could be chosen) and its request;
        # for those who measure. It must not raise.
        self.on_chosen: Callable[[Tensor, Sequence[int], Sequence[int], Sequence[Request]], None] | None = None
        # For who lets nothing change the model between its steps: its weights are compared (0.1 to 0.3 ms for 30 layers) in the first step
        # after each `add` alone.
        self.weights_fixed = False
        self._added = True  # since the last step

    def fresh(self) -> Engine:
        """An engine of the same model, adapters and settings without requests, on a cache of its own; also while this one is in a step.

        ValueError for one with a DecodeGraph, whose graphs belong to its cache.
        """
        if self.decode is not None:
            raise ValueError("an engine with a DecodeGraph has no second one beside it; make a new LLM")
        scheduler = self.scheduler
        made = Engine(
            self.model, self.cache.fresh(), tokenizer=self.tokenizer, eos_ids=self.eos_ids, max_length=self.max_length,
            max_batch=scheduler.max_batch, max_prefill_tokens=scheduler.max_prefill_tokens,
            enable_prefix_caching=scheduler.prefix is not None, draft=None if scheduler.draft is None else scheduler.draft.fresh(),
        )  # fmt: skip
        made.adapters, made.on_chosen = self.adapters, self.on_chosen
        return made

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    @locked
    def add(
        self,
        request_id: str,
        tokens: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
        grammar: Grammar | None = None,
        priority: tuple[float, float] = (0.0, 0.0),
        adapter: str | None = None,
        salt: str = "",
    ) -> None:
        """Takes a request in; ValueError, in a sentence, for one that cannot run. stream: an output after each of its tokens.

        grammar: what `compile` gave for these params, so that the lock is not held for as long as a grammar takes.
        priority: those of lower numbers get places and pages first, compared in order; equal ones as they come. adapter: the name of one
        of `adapters`. salt: requests of different salts share no pages of the prefix cache, so the time of one tells nothing of another's.
        """
        if request_id in self._requests:
            raise ValueError(f"a request {request_id!r} is running already; choose another id")
        if params.num_beams > 1:
            raise ValueError(
                f"num_beams={params.num_beams}: beam search does not run in a batch with others; use LLM.generate"
            )
        max_length = self.check(tokens, params)
        request = Request(
            request_id, prompt, tokens, params, arrival=self._arrivals, max_length=max_length, eos_ids=self.eos_ids,
            tokenizer=self.tokenizer, grammar=grammar or self._grammars.compile(params), stream=stream, priority=priority,
            adapter=None if adapter is None else self.adapters[adapter], salt=salt,
        )  # fmt: skip
        self._arrivals += 1
        self._requests[request_id] = request
        self._added = True
        for sample in request.samples:
            self.scheduler.add(sample)

    def compile(self, params: SamplingParams) -> Grammar | None:
        """The grammar of the parameters, None without one; while the engine steps, too. ValueError for one that cannot be followed."""
        return self._grammars.compile(params)

    def check(self, tokens: Sequence[int], params: SamplingParams) -> int:
        """The number of tokens, those of the prompt included, at which the request ends at the latest; ValueError if it cannot run."""
        vocab = self.model.config.vocab_size
        if len(tokens) == 0:
            raise ValueError("the prompt is empty; it needs at least one token, e.g. the beginning-of-text token")
        if len(tokens) >= self.max_length:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens and the context {self.max_length}; shorten the prompt to "
                f"{self.max_length - 1} tokens or fewer" + _larger(self.max_length, self.model.config.max_positions)
            )
        if not all(0 <= token < vocab for token in tokens):
            wrong = next(token for token in tokens if not 0 <= token < vocab)
            raise ValueError(f"the prompt has the token id {wrong}; this model's ids go from 0 to {vocab - 1}")
        beyond = [t for t in (*(params.logit_bias or ()), *(params.stop_token_ids or ())) if not 0 <= t < vocab]
        if beyond:
            raise ValueError(
                f"logit_bias or stop_token_ids has the token id {beyond[0]}; this model's ids go from 0 to {vocab - 1}"
            )
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise ValueError(
                "stop strings and bad_words need a tokenizer, and this engine has none; use stop_token_ids"
            )
        max_length = (
            self.max_length if params.max_tokens is None else min(self.max_length, len(tokens) + params.max_tokens)
        )
        needed = -(-max_length // self.cache.page_size)
        if needed > self.num_pages:
            raise ValueError(
                f"the cache is too small: {len(tokens)} prompt tokens and up to {max_length - len(tokens)} new ones need {needed} "
                f"pages of {self.cache.page_size} tokens, and there are {self.num_pages}; lower max_tokens, or make the cache "
                f"larger with num_pages={needed} (LLM) or more"
            )
        return max_length

    @locked
    def append(self, seqs: Sequence[int], new: int) -> None:
        """Room in the cache for sequences of the caller's own; pages that only the prefix cache holds give way. CacheFull otherwise."""
        try:
            self.cache.append(seqs, new)
        except CacheFull as full:
            if self.scheduler.prefix is None or self.scheduler.prefix.evict(full.missing) < full.missing:
                raise
            self.cache.append(seqs, new)

    @locked
    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request; what it has so far, with finish_reason "abort". None if it is not running."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for sample in request.samples:
            self.scheduler.release(sample)
            if sample.finish_reason is None:
                sample.finish_reason = "abort"
        return request.output()

    @locked
    def step(self) -> list[RequestOutput]:
        """One step of the model for all that can run: outputs of the requests that finished, and of all changed ones that stream."""
        keepers: list[Any] = [runner for runner in (self.model, self.decode) if hasattr(runner, "looks_at_weights")]
        for runner in keepers:
            runner.looks_at_weights = self._added or not self.weights_fixed
        self._added = False
        try:
            return self._step()
        finally:
            for runner in keepers:
                runner.looks_at_weights = True

    @torch.inference_mode()
    def _step(self) -> list[RequestOutput]:
        start = time.perf_counter()
        groups = self.scheduler.schedule()
        if not groups and self._requests:
            raise CacheFull(
                f"nothing can run: the cache has {self.cache.num_pages} pages, {self.cache.free_pages} are free, and sequences that are "
                "not this engine's hold the others; free them"
            )
        rows: list[Tensor] = []
        ready: list[_Ready] = []
        logits: Tensor | None = None
        prefilled = 0
        for group in groups:
            prefilled += (
                group.new * len(group.samples) if group.prompt or (group.new > 1 and group.drafts is None) else 0
            )
            logits = self._run(group, rows, ready, alone=len(groups) == 1)
        changed: dict[Request, None] = {}  # in order
        chosen = 0
        if ready:
            if logits is None:
                logits = self.model.logits(rows[0] if len(rows) == 1 else torch.cat(rows))
            chosen = self._choose(logits, ready, changed)
        now = time.perf_counter()
        self._count(prefilled, chosen, now - start)
        return self._outputs(changed, now)

    def _run(self, group: Group, rows: list[Tensor], ready: list[_Ready], *, alone: bool) -> Tensor | None:
        """One forward pass; adds the rows from which tokens can be chosen. Their logits, if they came with it and nothing else does."""
        samples, new, drafts, _ = group
        if drafts is not None:
            inputs = [[s.tokens[-1], *draft, *[0] * (new - 1 - len(draft))] for s, draft in zip(samples, drafts)]
        elif new == 1:
            inputs = [[s.tokens[s.cached]] for s in samples]
        else:
            inputs = [s.tokens[s.cached : s.cached + new] for s in samples]
        seqs: list[int] = [s.seq for s in samples]  # type: ignore[misc]
        logits: Tensor | None = None
        adapters = [s.request.adapter for s in samples]
        if any(adapters):
            view = CacheView(self.cache, seqs, new, group.prompt)
            hidden = self.adapters.hidden(self.model, torch.tensor(inputs, device=self.device), view, adapters)
        elif self.decode is not None and new == 1 and drafts is None:
            last, logits = self.decode([token for [token] in inputs], seqs)
            hidden = (last if alone else last.clone())[:, None]  # another group's step may overwrite it
        else:
            view = CacheView(self.cache, seqs, new, group.prompt)
            hidden = self.model.hidden(torch.tensor(inputs, device=self.device), view)
        first = sum(len(block) for block in rows)
        if drafts is not None:
            rows.append(hidden.flatten(0, 1))
            ready += [_Ready(s, first + i * new, draft) for i, (s, draft) in enumerate(zip(samples, drafts))]
            return None
        complete: list[int] = []
        for i, sample in enumerate(samples):
            if sample.request.params.prompt_logprobs is not None and sample.cached < sample.prompt_length - 1:
                self._score_prompt(sample, hidden[i])
            sample.cached += new
            if self.scheduler.prefix is not None:
                self.scheduler.register(sample)
            if sample.cached == len(sample.tokens):
                ready.append(_Ready(sample, first + len(complete), []))
                if not sample.started and len(sample.request.samples) > 1:  # the others choose from the same row
                    ready += [_Ready(s, first + len(complete), []) for s in self.scheduler.fork(sample)]
                complete.append(i)
        if complete:
            last = hidden[:, -1]
            rows.append(last if len(complete) == len(samples) else last[complete])
        return logits if alone and len(complete) == len(samples) else None

    def _choose(self, logits: Tensor, ready: list[_Ready], changed: dict[Request, None]) -> int:
        """Tokens for all ready samples, then for those whose first draft was right, and so on; how many tokens."""
        chosen = depth = 0
        entries = ready
        while entries:
            rows = [entry.logits_row + depth for entry in entries]
            whole = len(rows) == len(logits) and rows == list(range(len(rows)))
            tokens, logprobs = sample_tokens(
                logits if whole else logits[rows], [entry.sample.sampling for entry in entries]
            )
            if self.on_chosen is not None:
                self.on_chosen(logits, rows, tokens, [entry.sample.request for entry in entries])
            right = []
            for i, (entry, token, alternatives) in enumerate(zip(entries, tokens, logprobs)):
                changed[entry.sample.request] = None
                if token < 0:
                    entry.sample.fail(no_choice(logits[rows[i]], entry.sample.sampling))
                    continue
                entry.sample.accept(token, alternatives)
                if depth < len(entry.draft) and token == entry.draft[depth] and entry.sample.finish_reason is None:
                    right.append(entry)
            chosen += len(entries)
            entries, depth = right, depth + 1
        for entry in ready:
            if entry.draft:
                self._reject(entry)
        return chosen

    def _reject(self, entry: _Ready) -> None:
        """Forgets the keys of the drafts that were wrong."""
        sample, metrics = entry.sample, entry.sample.request.metrics
        # all but the last token, whose keys the next step computes, and which is the end if it was a draft too
        accepted = max(0, len(sample.tokens) - 1 - sample.cached - 1)  # none where the first could not be chosen
        metrics.drafted_tokens += len(entry.draft)
        metrics.accepted_tokens += accepted
        self.stats.drafted_tokens += len(entry.draft)
        self.stats.accepted_tokens += accepted
        sample.cached = len(sample.tokens) - 1
        self.cache.truncate(sample.sequence, sample.cached)
        self.scheduler.register(sample)

    def _score_prompt(self, sample: Sample, hidden: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow those of this chunk, hidden [new, hidden]."""
        request, first = sample.request, sample.cached + 1
        following = sample.tokens[first : min(first + len(hidden), sample.prompt_length)]
        logits = self.model.logits(hidden[: len(following)])
        scored = top_logprobs(logits, following, [request.params.prompt_logprobs] * len(following))
        for i, entries in enumerate(scored):
            if entries is not None:
                request.prompt_logprobs[first + i] = request.describe(entries)

    def _count(self, prefilled: int, chosen: int, seconds: float) -> None:
        stats = self.stats
        stats.steps += 1
        stats.preemptions = self.scheduler.preemptions
        if prefilled:
            stats.prefill_tokens += prefilled
            stats.prefill_time += seconds
        else:
            stats.decode_tokens += chosen
            stats.decode_time += seconds

    def _outputs(self, changed: dict[Request, None], now: float) -> list[RequestOutput]:
        outputs = []
        for request in changed:
            if request.metrics.first_token_time is None:
                request.metrics.first_token_time = now
                self.stats.cached_tokens += request.metrics.cached_tokens
            done = False
            for sample in request.samples:
                if sample.finish_reason is not None:
                    if sample.seq is not None:
                        self.scheduler.release(sample)
                    done = True
            if done and request.finished:
                request.metrics.finished_time = now
                del self._requests[request.id]
                outputs.append(request.output())
            elif request.stream:
                outputs.append(request.output())
        return outputs


def _larger(max_length: int, max_positions: int) -> str:
    """What else helps against a short context."""
    if max_length == max_positions:
        return ""
    return f", or allow more with max_model_len and a cache that holds it; the model takes {max_positions}"
