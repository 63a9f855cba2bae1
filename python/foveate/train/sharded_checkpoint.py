"""The state of a run in several processes: each rank writes its part, and any number of ranks reads it.

torch.distributed.checkpoint stores tensors by name in pieces and puts them together as the reader's ranks need them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from foveate.train.state_files import trained

_NUMBERS = "numbers.json"


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, numbers: dict[str, Any]) -> None:
    """Called by every rank. What all ranks hold alike is written once."""
    tensors: dict[str, Tensor] = {f"random.{_rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"random_cuda.{_rank()}"] = torch.cuda.get_rng_state()
    for name, p in trained(model).items():
        tensors[f"parameter.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value)
    dcp.save(tensors, checkpoint_id=folder)
    if _rank() == 0:
        (folder / _NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse, on any number of ranks, or in one process without a group. ValueError where the state is not this model's.

    Ranks that the writer did not have keep their random state, so only an equal number goes on bit for bit.
    """
    stored: dict[str, Any] = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    parameters = trained(model)
    _check(folder, {name: tuple(m.size) for name, m in stored.items()}, parameters)
    tensors: dict[str, Tensor] = {}
    for name, metadata in stored.items():
        key, _, parameter = name.partition(".")
        if key in ("random", "random_cuda"):
            if int(parameter) == _rank() and (key == "random" or torch.cuda.is_available()):
                tensors[name] = torch.empty(metadata.size, dtype=torch.uint8)
            continue
        p = parameters[parameter]
        if key == "parameter":
            tensors[name] = p.detach()
            continue
        like = metadata.size == p.shape
        dtype = metadata.properties.dtype
        value = torch.zeros_like(p, dtype=dtype) if like else torch.zeros(metadata.size, dtype=dtype, device=p.device)
        tensors[name] = optimizer.state[p][key] = value.detach()
    with warnings.catch_warnings():
        # that there is one process, which may well be meant
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.load(tensors, checkpoint_id=folder)
    if f"random.{_rank()}" in tensors:
        torch.set_rng_state(tensors[f"random.{_rank()}"])
    if f"random_cuda.{_rank()}" in tensors:
        torch.cuda.set_rng_state(tensors[f"random_cuda.{_rank()}"])
    return json.loads((folder / _NUMBERS).read_text())


def _check(folder: Path, stored: dict[str, tuple[int, ...]], parameters: dict[str, nn.Parameter]) -> None:
    theirs = {name.removeprefix("parameter."): size for name, size in stored.items() if name.startswith("parameter.")}
    ours = {name: tuple(p.shape) for name, p in parameters.items()}
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"{folder} is the state of another model or another choice of trained weights: {name} has shape {theirs.get(name)} there and "
            f"{ours.get(name)} here, and {len(different) - 1} more differ; start in a new output folder"
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
