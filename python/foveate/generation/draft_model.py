"""Guesses of a smaller model, which the engine's model checks several at a time (Leviathan et al. 2023, arXiv 2211.17192; Chen et al. 2023,
arXiv 2302.01318)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.cache.paged import CacheFull, PagedKVCache
from foveate.cache.view import CacheView
from foveate.generation import memory
from foveate.generation.request import Sample
from foveate.generation.runner import fastest
from foveate.generation.sampler import SamplingState
from foveate.generation.sampler import sample as sample_tokens
from foveate.models import load_model, open_checkpoint
from foveate.models.registry import architecture_of


@dataclass
class _Known:
    """What the guessing model has in its cache of a sample: `tokens` as sequence `seq`, of which the first `agreed` are the sample's."""

    seq: int
    tokens: list[int] = field(default_factory=list)
    agreed: int = 0


class DraftModel:
    """A smaller causal model of the same tokens on a cache of its own.

    A guess is the token that the sampler would choose from this model's logits with the parameters and the random number of the
    sample at that place. The engine's model then chooses with the same number, and a guess is kept where it is the same token: greedy
    and sampled outputs are those without guesses, and where both models agree about the probabilities they agree about the token.

    model: as the Engine takes it. vocab_size: of the engine's model. tokens: guesses in a step. max_batch: with more samples in a step
    nothing is guessed. max_prefill_tokens: tokens that this model reads in one step before it guesses.
    """

    def __init__(
        self,
        model: Any,
        cache: PagedKVCache,
        *,
        vocab_size: int,
        tokens: int = 4,
        max_batch: int = 8,
        max_prefill_tokens: int = 512,
    ) -> None:
        for name, value in {"tokens": tokens, "max_batch": max_batch, "max_prefill_tokens": max_prefill_tokens}.items():
            if value < 1:
                raise ValueError(f"{name}={value} of a draft model must be 1 or more")
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        self.tokens, self.max_batch, self.max_prefill_tokens = tokens, max_batch, max_prefill_tokens
        self._known: dict[Sample, _Known] = {}

    def fresh(self) -> DraftModel:
        """The same model on an empty cache."""
        return DraftModel(
            self.model, self.cache.fresh(), vocab_size=self.vocab_size, tokens=self.tokens, max_batch=self.max_batch,
            max_prefill_tokens=self.max_prefill_tokens,
        )  # fmt: skip

    def drafts(self, samples: Sequence[Sample]) -> list[list[int]]:
        """For each sample the tokens that may follow; [] where nothing is guessed: too many samples, no room, a text read only in part."""
        drafts: dict[Sample, list[int]] = {sample: [] for sample in samples}
        rows = {sample: _row(sample) for sample in samples if self._room(sample) > 0}
        if len(samples) > self.max_batch or not rows:
            return list(drafts.values())
        guessing, hidden = self._catch_up(list(rows))
        while guessing and hidden is not None:
            tokens = sample_tokens(self.model.logits(hidden), [rows[sample] for sample in guessing]).tokens
            going = []
            for sample, token in zip(guessing, tokens):
                if not 0 <= token < self.vocab_size:
                    continue
                drafts[sample].append(token)
                rows[sample].tokens.append(token)
                if len(drafts[sample]) < self._room(sample) and token not in sample.request.eos_ids:
                    going.append(sample)
            guessing = going
            hidden = self._run(guessing, [[drafts[sample][-1]] for sample in guessing]) if guessing else None
        return list(drafts.values())

    def forget(self, sample: Sample) -> None:
        """Frees what is known of a sample that has ended, or waits."""
        known = self._known.pop(sample, None)
        if known is not None:
            self.cache.free(known.seq)

    def _room(self, sample: Sample) -> int:
        """How many guesses are of use: the step gives one token more than it keeps of them."""
        length = len(sample.tokens)
        return min(self.tokens, sample.request.max_length - length - 1, self.model.config.max_positions - length)

    def _catch_up(self, samples: Sequence[Sample]) -> tuple[list[Sample], Tensor | None]:
        """Reads what the samples have got since the last step. Those that are read to the end, and the hidden states of their ends."""
        budget = self.max_prefill_tokens
        by_length: dict[int, list[Sample]] = {}
        for sample in samples:
            known = self._agreed(sample)
            new = min(len(sample.tokens) - len(known.tokens), budget)
            # ids beyond this model's table are of the other model alone
            if new > 0 and max(sample.tokens[len(known.tokens) :]) < self.model.config.vocab_size:
                by_length.setdefault(new, []).append(sample)
                budget -= new
        ready, ends = [], []
        for new, group in by_length.items():
            inputs = [s.tokens[len(self._known[s].tokens) :][:new] for s in group]
            hidden = self._run(group, inputs)
            if hidden is None:
                continue
            done = [i for i, s in enumerate(group) if len(self._known[s].tokens) == len(s.tokens)]
            ready += [group[i] for i in done]
            ends.append(hidden if len(done) == len(group) else hidden[done])
        return ready, torch.cat(ends) if ends else None

    def _agreed(self, sample: Sample) -> _Known:
        """What is known of a sample, without the guesses that were wrong, and without its last token."""
        known = self._known.get(sample)
        if known is None:
            known = self._known[sample] = _Known(self.cache.create())
        most = min(len(known.tokens), len(sample.tokens) - 1)
        agreed = min(known.agreed, most)
        while agreed < most and known.tokens[agreed] == sample.tokens[agreed]:
            agreed += 1
        if agreed < len(known.tokens):
            self.cache.truncate(known.seq, agreed)
            del known.tokens[agreed:]
        known.agreed = agreed
        return known

    def _run(self, samples: Sequence[Sample], inputs: list[list[int]]) -> Tensor | None:
        """The hidden states after as many new tokens of each sample; None where the cache has no room."""
        known = [self._known[sample] for sample in samples]
        seqs, new = [one.seq for one in known], len(inputs[0])
        try:
            self.cache.append(seqs, new)
        except CacheFull:
            return None
        tokens = torch.tensor(inputs, device=self.cache.k_pages.device)
        hidden = self.model.hidden(tokens, CacheView(self.cache, seqs, new))[:, -1]
        for one, given in zip(known, inputs):
            one.tokens += given
        return hidden


def _row(sample: Sample) -> SamplingState:
    """What the sampler has to know for guesses: the sample's parameters without what only the output needs."""
    params = sample.request.params
    row = SamplingState(
        params if params.logprobs is None else params.with_(logprobs=None), list(sample.tokens), seed=sample.request.seed,
        sample=sample.index, end_ids=sample.request.eos_ids | sample.request.stop_ids,
    )  # fmt: skip
    row.begin_output(sample.prompt_length)
    return row


def load_draft(
    path: Any, *, target: Any, tokenizer: Any, device: torch.device, quantization: str | None, num_pages: int, page_size: int,
    tokens: int, max_prefill_tokens: int,
) -> tuple[DraftModel, str]:  # fmt: skip
    """The DraftModel of a checkpoint for a model with the config `target`, and a sentence about what runs it.

    ValueError for a checkpoint that does not continue text, or whose tokens are others.
    """
    checkpoint = open_checkpoint(path)
    architecture = architecture_of(checkpoint.config)
    if not architecture.continues_text:
        raise ValueError(f"draft_model={str(path)!r} does not continue text; it is one for {architecture.suited}")
    _check_same_tokens(path, tokenizer, checkpoint.tokenizer(), target.vocab_size)
    module: Any = load_model(checkpoint, device=device, quantization=quantization)
    if getattr(module, "lm_head", module) is None:
        raise ValueError(f"draft_model={str(path)!r} has no language-model head; it is one for foveate.Embedder")
    module.requires_grad_(False)
    dtype = next(p for p in (*module.parameters(), *module.buffers()) if p.is_floating_point()).dtype
    model, runs_on = fastest(module, device)
    cache = PagedKVCache(num_pages, page_size, dtype=dtype, device=device, **memory.cache_sizes(module.config))
    draft = DraftModel(model, cache, vocab_size=target.vocab_size, tokens=tokens, max_prefill_tokens=max_prefill_tokens)
    return draft, f"{tokens} tokens at a time are guessed by {Path(str(path)).name} ({runs_on})"


def _check_same_tokens(path: Any, tokenizer: Any, other: Any, vocab_size: int) -> None:
    if tokenizer is None or other is None:
        return
    ours, theirs = tokenizer.backend.get_vocab(), other.backend.get_vocab()
    for text, token in ours.items():
        if token < vocab_size and theirs.get(text, token) != token:
            raise ValueError(
                f"draft_model={str(path)!r} has another tokenizer: {text!r} is the token {theirs[text]} there and {token} in the model; "
                "guesses need a model of the same family with the same tokens"
            )
    shared = sum(text in theirs for text in ours)
    if shared < 0.9 * len(ours):
        raise ValueError(
            f"draft_model={str(path)!r} has another tokenizer, with {shared} of the model's {len(ours)} tokens; guesses need a model of "
            "the same family with the same tokens"
        )
