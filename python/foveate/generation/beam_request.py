"""Beam search of one prompt on an engine's model and cache; the beams share their pages by fork."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.cache.view import CacheView
from foveate.generation.beam import BeamSearch
from foveate.generation.detokenizer import detokenize
from foveate.generation.engine import Engine
from foveate.generation.outputs import CompletionOutput, RequestMetrics, RequestOutput
from foveate.generation.params import SamplingParams


@torch.inference_mode()
def beam_request(
    engine: Engine, request_id: str, tokens: Sequence[int], params: SamplingParams, prompt: str | None = None
) -> RequestOutput:
    """The params.n best of params.num_beams beams. cumulative_logprob is the sum; the order is by score, with the length penalty."""
    max_length = engine.check(tokens, params)
    _check_room(engine, len(tokens), max_length, params.num_beams)
    ends = (frozenset() if params.ignore_eos else engine.eos_ids) | frozenset(params.stop_token_ids or ())
    metrics = RequestMetrics(time.perf_counter())
    search = BeamSearch(
        1, params.num_beams, max_length - len(tokens), ends, length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )  # fmt: skip
    seqs = [engine.cache.create()]
    try:
        for at in range(0, len(tokens), engine.scheduler.max_prefill_tokens):
            hidden = _forward(engine, seqs, [list(tokens[at : at + engine.scheduler.max_prefill_tokens])])
        rows = hidden.expand(params.num_beams, -1)
        while True:
            log_probs = engine.model.logits(rows).float().log_softmax(-1)
            if search.length < params.min_tokens and ends:
                log_probs[:, sorted(ends)] = -torch.inf
            if not log_probs.amax(-1).isfinite().all():
                raise ValueError(
                    "beam search cannot go on: the model's logits are not finite, or min_tokens forbids every token that it could choose"
                )
            parents, chosen = search.step(log_probs)
            metrics.first_token_time = metrics.first_token_time or time.perf_counter()
            if search.done:
                break
            seqs = _follow(engine, seqs, [parent % len(seqs) for parent in parents.tolist()])
            rows = _forward(engine, seqs, chosen[:, None].tolist())
    finally:
        for seq in seqs:
            engine.cache.free(seq)
    metrics.finished_time = time.perf_counter()
    outputs = []
    for i, (ids, score) in enumerate(search.results(params.n)[0]):
        stopped = ids[-1] in ends
        text_ids = ids[:-1] if stopped and not params.include_stop_str_in_output else ids
        outputs.append(
            CompletionOutput(
                index=i,
                text=""
                if engine.tokenizer is None
                else detokenize(engine.tokenizer, text_ids, params.skip_special_tokens),
                token_ids=ids,
                cumulative_logprob=score * len(ids) ** params.length_penalty,
                logprobs=None,
                finish_reason="stop" if stopped else "length",
                stop_reason=ids[-1] if stopped and ids[-1] not in engine.eos_ids else None,
            )
        )
    return RequestOutput(request_id, prompt, list(tokens), None, outputs, True, metrics)


def _check_room(engine: Engine, prompt_length: int, max_length: int, beams: int) -> None:
    size = engine.cache.page_size
    needed = prompt_length // size + beams * (-(-max_length // size) - prompt_length // size) + 1
    if needed > engine.num_pages:
        raise ValueError(
            f"the cache is too small: {beams} beams of up to {max_length} tokens need {needed} pages of {size} tokens, and there are "
            f"{engine.num_pages}; lower num_beams or max_tokens, or make the cache larger with num_pages={needed} (LLM) or more"
        )


def _follow(engine: Engine, seqs: list[int], parents: list[int]) -> list[int]:
    """The sequences of the beams that go on: the first child of a beam takes its sequence, others are forks."""
    taken: set[int] = set()
    following = []
    for parent in parents:
        following.append(engine.cache.fork(seqs[parent]) if parent in taken else seqs[parent])
        taken.add(parent)
    for i, seq in enumerate(seqs):
        if i not in taken:
            engine.cache.free(seq)
    return following


def _forward(engine: Engine, seqs: list[int], tokens: list[list[int]]) -> Tensor:
    """The hidden state of the last token, [len(seqs), hidden]."""
    new = len(tokens[0])
    engine.append(seqs, new)
    view = CacheView(engine.cache, seqs, new)
    return engine.model.hidden(torch.tensor(tokens, device=engine.device), view)[:, -1]
