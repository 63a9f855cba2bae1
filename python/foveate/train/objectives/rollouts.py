"""Completions of the model that is trained: by the engine of generation, on the training weights themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate.cache.paged import PagedKVCache
from foveate.generation import memory
from foveate.generation.engine import Engine
from foveate.generation.outputs import CompletionOutput
from foveate.generation.params import SamplingParams
from foveate.tokenizer import Tokenizer

_PAGE = 16
_MAX_BATCH = 64
_CACHE_SHARE = 0.25  # of the free memory


def generate(
    model: Any, tokenizer: Tokenizer, prompts: Sequence[list[int]], *, count: int, temperature: float, max_tokens: int, max_length: int,
    seeds: Sequence[int],
) -> list[list[CompletionOutput]]:  # fmt: skip
    """`count` completions of each prompt, all in one run of continuous batching; each depends on its prompt and seed alone.

    The engine reads the modules that are trained: nothing is copied, packed or merged, and an optimizer's step is seen by the next call.
    (NativeDecoder would pack its weights, which then are copies.) The cache lives as long as the call.
    """
    device, longest = next(model.parameters()).device, min(max_length, max(map(len, prompts)) + max_tokens)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batch = min(_MAX_BATCH, count * len(prompts))
    one = -(-longest // _PAGE)
    pages, free = batch * one, memory.available(device)
    if free is not None:
        room = int(free * _CACHE_SHARE) // (_PAGE * memory.token_bytes(model.config, dtype))
        pages = max(one + 1, min(pages, room))
    cache = PagedKVCache(pages, _PAGE, dtype=dtype, device=device, **memory.cache_sizes(model.config))
    engine = Engine(
        model, cache, tokenizer=tokenizer, eos_ids=tokenizer.eos_ids, max_length=max_length, max_batch=batch
    )
    training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            for i, (prompt, seed) in enumerate(zip(prompts, seeds)):
                wanted = SamplingParams(n=count, temperature=temperature, max_tokens=max_tokens, seed=seed)
                engine.add(str(i), prompt, wanted)
            found: list[list[CompletionOutput]] = [[] for _ in prompts]
            while engine.has_work:
                for output in engine.step():
                    found[int(output.request_id)] = sorted(output.outputs, key=lambda sample: sample.index)
    finally:
        model.train(training)
    for sample in (sample for group in found for sample in group):
        if sample.finish_reason == "abort":
            raise RuntimeError(f"a completion could not be drawn: {sample.stop_reason}")
    return found
