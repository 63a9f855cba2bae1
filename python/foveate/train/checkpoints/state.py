"""The state of a run in safetensors and JSON, never a pickle: parameters, the optimizer's state, random state, counters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError, is_there, library_errors, read_json

TENSORS, _SCALARS = "state.safetensors", "state.json"


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that receive gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators, from which dropout draws (also that of the attention kernels)."""
    found = {"random.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["random.cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["random.cpu"])
    if "random.cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random.cuda"])


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    tensors = random_state()
    for name, p in trained(model).items():
        tensors[f"parameter.{name}"] = p.detach().contiguous()
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).contiguous()
    save_file({name: tensor.cpu() for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / _SCALARS).write_text(json.dumps(scalars, indent=1) + "\n")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Raises ValueError where the state is not that of this model."""
    from safetensors.torch import load_file

    is_there(folder / TENSORS)
    with library_errors(
        f"{folder / TENSORS} is truncated or not a safetensors file", "; resume from another checkpoint"
    ):
        tensors = load_file(folder / TENSORS)
    parameters = trained(model)
    stored = {name.removeprefix("parameter.") for name in tensors if name.startswith("parameter.")}
    if stored != set(parameters):
        different = sorted(stored ^ set(parameters))
        raise CheckpointError(
            f"{folder} is the state of another model or another choice of trained weights: {', '.join(different[:4])} "
            f"{'differ' if len(different) > 1 else 'differs'}; start in a new output folder"
        )
    keys = {name.partition(".")[0] for name in tensors} - {"parameter", "random"}
    with torch.no_grad():
        for name, p in parameters.items():
            value = tensors[f"parameter.{name}"]
            if value.shape != p.shape:
                raise CheckpointError(
                    f"{folder} has {name} of shape {list(value.shape)}, the model of {list(p.shape)}; start in a new output folder"
                )
            p.copy_(value)
            for key in keys:
                if f"{key}.{name}" in tensors:
                    value = tensors[f"{key}.{name}"]
                    if value.shape not in (p.shape, torch.Size()):
                        raise CheckpointError(
                            f"{folder} has {key}.{name} of shape {list(value.shape)}, the model {list(p.shape)}"
                        )
                    # "step" too, for the fused AdamW; a copy, as a view of the file would keep its room on the disk after it is deleted
                    optimizer.state[p][key] = value.to(p.device, copy=True)
    if "random.cpu" not in tensors:
        raise CheckpointError(f"{folder} lacks random.cpu, the random state; resume from another checkpoint")
    with library_errors(f"{folder} has a random state that torch does not take"):
        set_random_state(tensors)
    return read_scalars(folder / _SCALARS)


def read_scalars(file: Path) -> dict[str, Any]:
    """The counters of a state. CheckpointError where they are not there or no object."""
    if not is_there(file):
        raise CheckpointError(f"{file} is not there, so the state is not whole; resume from another checkpoint")
    return read_json(file)


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Nothing for no tensors."""
    from safetensors.torch import save_file

    if tensors:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The inverse; {} without the file."""
    from safetensors.torch import load_file

    if not file.exists():
        return {}
    with library_errors(f"{file} is truncated or not a safetensors file", "; resume from another checkpoint"):
        return load_file(file)
