"""Checksums of what a run was made from, so that one that goes on with something else is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from foveate.files.data_files import data_files
from foveate.models import open_checkpoint
from foveate.nn import PackedLinear
from foveate.train.config import TrainConfig

_SAMPLES = 512  # values of each tensor: another training changes nearly all of them
_BLOCK = 2**20


def frozen_checksum(model: nn.Module) -> str:
    """A checksum of the weights that are not trained, by samples of each; "" if all are."""
    tensors = [(name, p.detach()) for name, p in model.named_parameters() if not p.requires_grad]
    tensors += [(f"{name}.packed", m.data) for name, m in model.named_modules() if isinstance(m, PackedLinear)]
    return _of_samples(tensors) if tensors else ""


def start_checksum(model: nn.Module) -> str:
    """A checksum of all weights, by samples of each."""
    tensors = [(name, p.detach()) for name, p in model.named_parameters()]
    return _of_samples(
        [*tensors, *((f"{name}.packed", m.data) for name, m in model.named_modules() if isinstance(m, PackedLinear))]
    )


def _of_samples(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.flatten()
        places = torch.linspace(0, max(len(flat) - 1, 0), min(_SAMPLES, len(flat)), dtype=torch.float64).long()
        digest.update(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sources(config: TrainConfig) -> dict[str, str]:
    """Checksums of the data files, and of the model's and the tokenizer's files, whatever their paths are; for a large file of weights
    of its size and parts of it."""
    found = {"train_data": _files(file for path in config.train_data for file in data_files(path))}
    if config.eval_data:
        found["eval_data"] = _files(file for path in config.eval_data for file in data_files(path))
    if config.model is not None:
        path = Path(config.model).expanduser()
        found["model"] = _files([path if path.exists() else open_checkpoint(config.model).path], whole=False)
    if config.tokenizer not in (None, "char"):
        found["tokenizer"] = _files([Path(str(config.tokenizer)).expanduser()], whole=False)
    return found


def _files(paths: Iterable[Path], whole: bool = True) -> str:
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]:
            size = file.stat().st_size
            digest.update(f"{size} ".encode())
            step = _BLOCK if whole or size <= 64 * _BLOCK else size // 64
            with file.open("rb") as stream:
                for at in range(0, size, step):
                    stream.seek(at)
                    digest.update(stream.read(_BLOCK))
    return digest.hexdigest()
