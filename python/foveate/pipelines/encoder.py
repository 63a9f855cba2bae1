"""What the pipelines of encoders share: loading, the labels of a config, and forward passes over packed texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models import load_model, open_checkpoint
from foveate.models.registry import find, model_types
from foveate.models.sequences import PackedSequences
from foveate.tokenizer import Tokenizer

TOKENS_PER_BATCH = 4096  # in one forward pass, unless a single text is longer


@dataclass
class LoadedEncoder:
    """A model with its tokenizer; config: the checkpoint's config.json, {} for a model that was passed."""

    model: Any
    tokenizer: Tokenizer
    config: dict[str, Any]
    folder: Path | None = None

    @property
    def labels(self) -> list[str]:
        """The names of the classes by their number."""
        known = self.config.get("id2label") or {}
        return [str(known.get(str(i), f"LABEL_{i}")) for i in range(self.model.config.num_labels)]


def load_encoder(
    path_or_model: str | Path | nn.Module,
    tokenizer: Tokenizer | None,
    *,
    task: str,
    head: str,
    **options: Any,
) -> LoadedEncoder:
    """task: as the errors name it; head, options: of `load_model`. ValueError for another architecture and without a tokenizer."""
    config: dict[str, Any] = {}
    folder = None
    if isinstance(path_or_model, nn.Module):
        model: Any = path_or_model
    else:
        checkpoint = open_checkpoint(path_or_model)
        config, folder = checkpoint.config, checkpoint.path
        encoders = model_types(heads=True)
        architecture = find(config.get("model_type"))
        reads = architecture is not None and head in architecture.readers
        if config.get("model_type") not in encoders and not reads:
            raise ValueError(
                f"{path_or_model} is of architecture {config.get('model_type')!r}; {task} needs "
                f"{' or '.join(map(repr, encoders))}, fine-tuned for it"
            )
        model = load_model(checkpoint, head=head, **options)
        tokenizer = tokenizer or checkpoint.tokenizer()
    if tokenizer is None:
        raise ValueError(f"there is no tokenizer: {path_or_model} has no tokenizer.json; pass tokenizer=")
    return LoadedEncoder(model, tokenizer, config, folder)


def as_texts(text: str | Sequence[str], name: str = "the text") -> list[str]:
    """A list of texts; TypeError for what is none."""
    texts = [text] if isinstance(text, str) else list(text)
    for i, entry in enumerate(texts):
        if not isinstance(entry, str):
            raise TypeError(f"{name} {i} is a {type(entry).__name__}, not a str: {entry!r:.80}")
    return texts


def batches(lengths: Sequence[int], tokens_per_batch: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Indices of texts, by length, for each forward pass: texts of like length, at most tokens_per_batch tokens together."""
    if tokens_per_batch < 1:
        raise ValueError(f"tokens_per_batch={tokens_per_batch} must be 1 or more")
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and total + lengths[i] > tokens_per_batch:
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += lengths[i]
    if batch:
        yield batch


@torch.inference_mode()
def run_packed(
    model: nn.Module, encodings: Sequence[Any], forward: Callable[[Tensor, Tensor, PackedSequences], Tensor]
) -> tuple[Tensor, PackedSequences]:
    """forward(ids [1, total], token types [1, total], packed) of encodings one after the other, without padding."""
    device = next(model.parameters()).device
    ids = torch.tensor([i for e in encodings for i in e.ids], device=device)
    types = torch.tensor([i for e in encodings for i in e.type_ids], device=device)
    packed = PackedSequences.of([len(e.ids) for e in encodings]).to(device)
    return forward(ids[None], types[None], packed), packed
