"""The forward passes that are recorded: of a causal model in chunks, each a step of bounded length, and of an encoder in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.inspect.parts import Parts
from foveate.inspect.recording import Recorder, RecordingCache, recording_sequences
from foveate.inspect.results import Inspection, Lens, TokenChoice
from foveate.inspect.rollout import rollout
from foveate.inspect.wanted import Wanted
from foveate.models.sequences import check_positions

CHUNK = 512  # tokens of a step
_ROWS_OF_LENS = 256  # distributions over the vocabulary in memory at a time


class Pass:
    """`step()` until it says True, then `result()`. A step is a chunk of the text, or one layer's logit lens. tokens: int64 [S].

    texts: the text of some token ids, [] -> []. hidden: of a causal model, (tokens [1, n], cache) -> [1, n, hidden], in place of the
    model's own, for one that runs with an adapter.
    """

    def __init__(
        self, parts: Parts, tokens: Sequence[int], wanted: Wanted, texts: Callable[[Sequence[int]], list[str]], *,
        types: Sequence[int] | None = None, hidden: Callable[[Tensor, Any], Tensor] | None = None, chunk: int = CHUNK,
    ) -> None:  # fmt: skip
        self.parts, self.wanted, self.ids, self.texts = parts, wanted, list(tokens), texts
        self._types, self._chunk = types, chunk
        self._device = next(iter([*parts.model.parameters(), *parts.model.buffers()])).device
        self._tokens = torch.tensor([self.ids], device=self._device)
        check_positions(self._tokens, None, parts.model.config.max_positions, "; shorten the text")
        self.recorder = Recorder(parts, wanted, len(self.ids))
        self._cache = RecordingCache(self.recorder, self._device)
        self._hidden = hidden or (lambda tokens, cache: parts.model.hidden(tokens, cache))
        self._read = False  # whether the whole text has been
        self._lens: list[tuple[Tensor, Tensor, Tensor]] = []
        self._choices: list[TokenChoice | None] = [None] if parts.kind == "causal" else []

    @torch.no_grad()
    def step(self) -> bool:
        """Runs the next one; whether it was the last."""
        if self._read:
            self._read_layer()
        else:
            self._read = self._run_chunk()
        layers = self.parts.num_layers + 1 if self.wanted.lens_top else 0
        return self._read and len(self._lens) == layers

    def _run_chunk(self) -> bool:
        recorder = self.recorder
        with recorder.watching():
            if self.parts.kind != "causal":
                self._encode()
                return True
            self._cache.new = min(self._chunk, len(self.ids) - recorder.first)
            chunk = self._tokens[:, recorder.first : recorder.first + self._cache.new]
            hidden = self._hidden(chunk, self._cache)[0]
        if self.wanted.choices:
            following: list[int | None] = [*self.ids[recorder.first + 1 : recorder.first + 1 + len(hidden)]]
            following += [None] * (len(hidden) - len(following))
            self._choose(hidden, following)
        recorder.first += self._cache.new
        return recorder.first >= len(self.ids)

    def _encode(self) -> None:
        encoder = getattr(self.parts.model, "bert", self.parts.model)
        types = None if self._types is None else torch.tensor([self._types], device=self._device)
        hidden = encoder(self._tokens, types, packed=recording_sequences(self.recorder, self._device))[0]
        if self.wanted.choices:
            self._choose(hidden, list(self.ids))

    def _choose(self, hidden: Tensor, chosen: Sequence[int | None]) -> None:
        for at in range(0, len(hidden), _ROWS_OF_LENS):
            logits = self.parts.model.logits(hidden[at : at + _ROWS_OF_LENS]).float()
            self._choices += _choices(logits, chosen[at : at + _ROWS_OF_LENS], self.wanted.top, self.texts)

    @torch.no_grad()
    def result(self) -> Inspection:
        wanted = self.wanted
        inspection = Inspection(
            type(self.parts.model).__name__, self.ids, self.texts(self.ids), wanted.layers, wanted.heads, wanted.rows,
            self.recorder.attention, choices=self._choices if wanted.choices else [],
        )  # fmt: skip
        if wanted.rollout:
            inspection.rollout = rollout(self.recorder)
        if wanted.lens_top:
            inspection.lens = self._found_lens()
        return inspection

    def _read_layer(self) -> None:
        stream = self.recorder.stream
        if stream is None:
            raise RuntimeError("the logit lens reads the stream between layers, and no layer has run under watching()")
        dtype = next((p.dtype for p in self.parts.model.parameters() if p.is_floating_point()), torch.float32)
        blocks = []
        for rows in stream[len(self._lens)].split(_ROWS_OF_LENS):
            logprobs = self.parts.read(rows.to(dtype)).float().log_softmax(-1)
            best = logprobs.topk(min(self.wanted.lens_top, logprobs.shape[-1]))
            blocks.append((best.indices.cpu(), best.values.exp().cpu(), _entropy(logprobs).cpu()))
        ids, probabilities, entropy = zip(*blocks)
        self._lens.append((torch.cat(ids), torch.cat(probabilities), torch.cat(entropy)))

    def _found_lens(self) -> Lens:
        ids, probabilities, entropy = (torch.stack(part) for part in zip(*self._lens))
        texts = [[self.texts(row) for row in layer] for layer in ids.tolist()]
        return Lens(ids, probabilities, entropy, texts)


def _entropy(logprobs: Tensor) -> Tensor:
    """-sum p log p, where 0 log 0 is 0."""
    return -(logprobs.exp() * logprobs.clamp_min(-1e30)).sum(-1)


def _choices(
    logits: Tensor, chosen: Sequence[int | None], top: int, texts: Callable[[Sequence[int]], list[str]]
) -> list[TokenChoice | None]:
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, logprobs.shape[-1]))
    ids = torch.tensor([-1 if token is None else token for token in chosen], device=logits.device)
    own = logprobs.gather(-1, ids.clamp_min(0)[:, None])
    ranks = (logprobs > own).sum(-1) + 1
    columns = (
        _entropy(logprobs).tolist(), own[:, 0].tolist(), ranks.tolist(), best.indices.tolist(), best.values.tolist(),
        texts([-1 if token is None else token for token in chosen]),
    )  # fmt: skip
    choices: list[TokenChoice | None] = []
    for token, entropy, logprob, rank, others, values, text in zip(chosen, *columns):
        alternatives = list(zip(others, texts(others), values))
        known = token is not None
        choices.append(
            TokenChoice(token, text, logprob if known else None, rank if known else None, entropy, alternatives)
        )
    return choices
