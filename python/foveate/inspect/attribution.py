"""What a score rests on: gradient x input, and integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) of input embeddings."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.inspect.parts import Parts
from foveate.inspect.results import Attribution
from foveate.models.sequences import PackedSequences, check_positions

_ROWS = 4096  # tokens of a batch of steps, unless the text is longer


class Subject:
    """A text before a model, which runs it with other embeddings in the place of those of its tokens."""

    def __init__(self, parts: Parts, ids: Sequence[int], types: Sequence[int] | None = None) -> None:
        self.parts, self.ids = parts, list(ids)
        self._device = next(iter([*parts.model.parameters(), *parts.model.buffers()])).device
        self._tokens = torch.tensor([self.ids], device=self._device)
        self._types = None if types is None else torch.tensor([list(types)], device=self._device)
        check_positions(self._tokens, None, parts.model.config.max_positions, "; shorten the text")

    def embeddings(self) -> Tensor:
        """[1, tokens, size]: the rows of the embedding table, before scales, positions and norms."""
        with torch.no_grad():
            return self.parts.embedding(self._tokens).detach()

    def outputs(self, embeddings: Tensor) -> Any:
        """The outputs for n texts with these embeddings [n, tokens, size]: hidden states [n, tokens, hidden] of a language model,
        logits [n, classes], or the logits of start and end, [n, tokens] each. Differentiable."""
        model, n, S = self.parts.model, embeddings.shape[0], len(self.ids)
        if self.parts.kind == "causal":
            with _in_place_of(self.parts.embedding, embeddings):
                return model.hidden(self._tokens.expand(n, S))
        packed = PackedSequences.of([S] * n).to(self._device)
        tokens = self._tokens.repeat(1, n)
        types = None if self._types is None else self._types.repeat(1, n)
        with _in_place_of(self.parts.embedding, embeddings.flatten(0, 1)[None]):
            if self.parts.kind == "classes":
                return model(tokens, types, packed=packed)
            if self.parts.kind == "answers":
                return tuple(x.view(n, S) for x in model(tokens, types, packed=packed))
            return getattr(model, "bert", model)(tokens, types, packed=packed).view(n, S, -1)


Score = Callable[[Any], Tensor]  # of a Subject's outputs: [n]


@contextlib.contextmanager
def _in_place_of(embedding: nn.Module, x: Tensor) -> Iterator[None]:
    """The module gives x in this thread while it is open."""
    here = threading.get_ident()
    hook = embedding.register_forward_hook(lambda module, args, out: x if threading.get_ident() == here else out)
    try:
        yield
    finally:
        hook.remove()


def attribute(
    subject: Subject, scores: Sequence[tuple[str, Score]], method: str, steps: int, baseline: Tensor | None
) -> list[Attribution]:
    """One for each of the named scores. baseline: [size] or [tokens, size], `mean_embedding` if None; steps: of integrated gradients."""
    x = subject.embeddings()
    if method == "gradient x input":
        return [_gradient_x_input(subject, x, target, score) for target, score in scores]
    baseline = mean_embedding(subject.parts) if baseline is None else baseline
    if baseline.shape not in (x.shape[-1:], x.shape[1:]):
        raise ValueError(
            f"baseline has shape {list(baseline.shape)}; it must be [{x.shape[-1]}], one embedding, or {list(x.shape[1:])}, one for "
            "each token"
        )
    base = baseline.to(x).expand_as(x[0])[None]
    return [_integrated(subject, x, base, target, score, steps) for target, score in scores]


def mean_embedding(parts: Parts) -> Tensor:
    """[size]: of the whole vocabulary. Zeros would be a bad place to start from: an RMSNorm is not continuous there."""
    device = next(iter([*parts.model.parameters(), *parts.model.buffers()])).device
    vocab = parts.model.config.vocab_size
    with torch.no_grad():
        blocks = torch.arange(vocab, device=device).split(_ROWS)
        return sum((parts.embedding(ids).float().sum(0) for ids in blocks), torch.zeros((), device=device)) / vocab


def _gradient_x_input(subject: Subject, x: Tensor, target: str, score: Score) -> Attribution:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        total = score(subject.outputs(leaf))
        (gradient,) = torch.autograd.grad(total.sum(), leaf)
    values = (gradient.float() * x.float()).sum(-1)[0]
    return Attribution("gradient x input", target, float(total.detach()), values.cpu())


def _integrated(subject: Subject, x: Tensor, base: Tensor, target: str, score: Score, steps: int) -> Attribution:
    """The mean gradient at the middles of `steps` parts of the way from the baseline, times the way."""
    total = torch.zeros_like(x[0], dtype=torch.float32)
    batch = max(1, _ROWS // x.shape[1])
    middles = (torch.arange(steps, device=x.device) + 0.5) / steps
    for some in middles.split(batch):
        with torch.enable_grad():
            points = (base + some.to(x.dtype)[:, None, None] * (x - base)).requires_grad_()
            (gradient,) = torch.autograd.grad(score(subject.outputs(points)).sum(), points)
        total += gradient.float().sum(0)
    values = ((x - base)[0].float() * total / steps).sum(-1).cpu()
    with torch.no_grad():
        here, there = (float(score(subject.outputs(point))) for point in (x, base))
    gap = float(values.sum()) - (here - there)
    return Attribution("integrated gradients", target, here, values, there, gap)
