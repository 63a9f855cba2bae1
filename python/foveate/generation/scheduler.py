"""Which samples run in the next step, and on which pages."""

from __future__ import annotations

import bisect
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

from foveate.cache.paged import CacheFull, PagedKVCache
from foveate.generation.prefix_cache import Node, PrefixCache
from foveate.generation.request import Sample

if TYPE_CHECKING:
    from foveate.generation.draft_model import DraftModel


class Group(NamedTuple):
    """Samples that run together: `new` tokens each, for which the cache has room; all of them of prompts, or none."""

    samples: list[Sample]
    new: int
    drafts: list[list[int]] | None  # of each sample, at most new - 1 tokens; None when nothing is guessed
    prompt: bool = False


class Scheduler:
    """Continuous batching (Yu et al. 2022, Orca): every step all running samples decode, and prompts advance by chunks.

    A sample waits until there is a place (max_batch) and memory for its tokens. When the cache is full, pages that only the prefix
    cache holds go first, then the sample that arrived last is preempted: it gives its pages back, waits, and is computed again.
    """

    def __init__(
        self, cache: PagedKVCache, *, max_batch: int, max_prefill_tokens: int, prefix_caching: bool, max_length: int,
        draft: DraftModel | None = None,
    ) -> None:  # fmt: skip
        self.cache = cache
        self.prefix = PrefixCache(cache) if prefix_caching else None
        self.max_batch, self.max_prefill_tokens, self.max_length = max_batch, max_prefill_tokens, max_length
        self.draft = draft
        self.waiting: list[Sample] = []  # both by priority
        self.running: list[Sample] = []
        self.preemptions = 0
        self._no_room = False  # for the first that waits, until some sample gives pages back

    def add(self, sample: Sample) -> None:
        bisect.insort(self.waiting, sample, key=lambda s: s.priority)

    def schedule(self) -> list[Group]:
        """The groups of the next step; their tokens are appended to the cache."""
        if self.waiting and len(self.running) < self.max_batch and not (self._no_room and self.running):
            self._admit()
        decoding = [s for s in self.running if s.started and len(s.tokens) - s.cached == 1]
        prefilling = len(self.running) - len(decoding)
        groups = self._drafts([s for s in decoding if s.lookup is not None or self.draft is not None])
        guessed = groups[0].samples if groups else []
        if decoding and len(guessed) < len(decoding):
            groups.append(self._group([s for s in decoding if s not in guessed] if guessed else decoding, 1))
        if prefilling:
            groups += self._chunks()
        # A sample of an earlier group may have given its pages to a later one.
        return [group for group in map(_without_preempted, groups) if group.samples]

    def _drafts(self, samples: list[Sample]) -> list[Group]:
        """One group of those samples that have a draft, or none."""
        guessed = [(s, draft) for s, draft in zip(samples, self._guesses(samples)) if draft]
        if not guessed:
            return []
        room = min(self.max_length - len(s.tokens) for s, _ in guessed)
        width = min(max(len(draft) for _, draft in guessed), room)
        if width < 1:
            return []
        try:
            self.cache.append([s.seq for s, _ in guessed], 1 + width)  # type: ignore[misc]
        except CacheFull:  # a guess is not worth another sample's pages
            return []
        return [Group([s for s, _ in guessed], 1 + width, [draft[:width] for _, draft in guessed])]

    def _guesses(self, samples: list[Sample]) -> list[list[int]]:
        """What may follow each sample: repetitions of its text where it asks for them, else what the smaller model says."""
        guesses = [sample.draft() for sample in samples]
        rest = [i for i, draft in enumerate(guesses) if not draft]
        if self.draft is not None and rest:
            for i, draft in zip(rest, self.draft.drafts([samples[i] for i in rest])):
                guesses[i] = draft
        return guesses

    def _chunks(self) -> list[Group]:
        """Prompts, and preempted samples that are computed again, by priority; chunks of equal length run together. A chunk has tokens of
        the prompt or of the output, since other kernels attend for these."""
        budget = self.max_prefill_tokens
        by_length: dict[tuple[int, bool], list[Sample]] = {}
        for sample in self.running:
            prompt = sample.cached < sample.prompt_length
            left = (sample.prompt_length if prompt else len(sample.tokens)) - sample.cached
            if (prompt or left > 1) and budget > 0:
                by_length.setdefault((min(left, budget), prompt), []).append(sample)
                budget -= min(left, budget)
        return [self._group(samples, new, prompt) for (new, prompt), samples in by_length.items()]

    def _group(self, samples: list[Sample], new: int, prompt: bool = False) -> Group:
        """Room for `new` tokens of each sample, or of those that are left when others had to give way."""
        while samples := [s for s in samples if s.seq is not None]:
            try:
                self.cache.append([s.seq for s in samples], new)  # type: ignore[misc]
                break
            except CacheFull as full:
                if self.prefix is None or not self.prefix.evict(full.missing):
                    self._preempt(self.running[-1])
        return Group(samples, new, None, prompt)

    def _admit(self) -> None:
        """Starts waiting samples, by priority, while there are places and pages for all of their tokens."""
        for sample in list(self.waiting):
            if len(self.running) >= self.max_batch:
                break
            leader = sample.request.samples[0]
            if sample is not leader and not sample.started and not leader.started and leader.finish_reason is None:
                continue  # it will be forked from the leader
            nodes = self._match(sample)
            pages = [node.page for node in nodes]
            # The pages found stay out of what can be evicted.
            seq = self.cache.create_from_pages(pages)
            needed = -(-(len(sample.tokens) + 1) // self.cache.page_size) - len(pages)
            free = self.cache.free_pages - self._promised()
            if needed > free and self.prefix is not None:
                free += self.prefix.evictable()
            if needed > free and self.running:
                self.cache.free(seq)
                self._no_room = True
                break
            self.waiting.remove(sample)
            sample.seq, sample.cached = seq, len(pages) * self.cache.page_size
            sample.registered, sample.node = len(nodes), nodes[-1] if nodes else None
            if not sample.started:
                sample.request.metrics.cached_tokens = sample.cached
            bisect.insort(self.running, sample, key=lambda s: s.priority)

    def _promised(self) -> int:
        """Pages that running samples still need for the tokens that they have."""
        size = self.cache.page_size
        return sum(-(-(len(s.tokens) + 1) // size) - -(-s.cached // size) for s in self.running)

    def _match(self, sample: Sample) -> list[Node]:
        wants_all = sample.request.params.prompt_logprobs is not None and not sample.started
        if self.prefix is None or wants_all:
            return []
        return self.prefix.match(sample.tokens, len(sample.tokens) - 1, _root(sample))

    def _preempt(self, sample: Sample) -> None:
        self.release(sample)
        sample.request.metrics.preemptions += 1
        self.preemptions += 1
        self.add(sample)

    def release(self, sample: Sample) -> None:
        """Takes a sample out and gives its pages back."""
        if self.draft is not None:
            self.draft.forget(sample)
        if sample.seq is not None:
            self.running.remove(sample)
            self.cache.free(sample.seq)
            self._no_room = False
            sample.seq, sample.cached, sample.registered, sample.node = None, 0, 0, None
        elif sample in self.waiting:
            self.waiting.remove(sample)

    def fork(self, leader: Sample) -> list[Sample]:
        """Starts the other samples of a request whose prompt is in the cache; as many as there are places for."""
        started = []
        for sample in leader.request.samples[1:]:
            if len(self.running) >= self.max_batch or sample not in self.waiting or sample.started:
                continue
            self.waiting.remove(sample)
            sample.seq, sample.cached = self.cache.fork(leader.sequence), leader.cached
            sample.registered, sample.node = leader.registered, leader.node
            bisect.insort(self.running, sample, key=lambda s: s.priority)
            started.append(sample)
        return started

    def register(self, sample: Sample) -> None:
        """Full pages become findable."""
        size = self.cache.page_size
        if self.prefix is None or sample.cached // size == sample.registered:
            return
        pages = self.cache.pages(sample.sequence)
        for i in range(sample.registered, sample.cached // size):
            sample.node = self.prefix.insert(
                sample.node, sample.tokens[i * size : (i + 1) * size], pages[i], _root(sample)
            )
        sample.registered = sample.cached // size


def _root(sample: Sample) -> Hashable:
    adapter, salt = sample.request.adapter, sample.request.salt
    weights = 0 if adapter is None else adapter.root
    return (salt, weights) if salt else weights


def _without_preempted(group: Group) -> Group:
    kept = [i for i, s in enumerate(group.samples) if s.seq is not None]
    if len(kept) == len(group.samples):
        return group
    drafts = None if group.drafts is None else [group.drafts[i] for i in kept]
    return Group([group.samples[i] for i in kept], group.new, drafts, group.prompt)
