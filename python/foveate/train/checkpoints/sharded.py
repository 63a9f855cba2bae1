"""The state of a run in several processes: each rank writes its part, and any number of ranks reads it.

rank-00003.safetensors holds the pieces of rank 3, and in its header's metadata the place of each in the whole tensor. torch's own
distributed checkpoints keep that in a pickle, which could run anything when it is read: a state folder comes from outside too.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foveate.files.checked import CheckpointError, check, integer, is_there, library_errors, list_of, mapping
from foveate.train.checkpoints.state import read_scalars, trained

_SCALARS = "numbers.json"
_SIZES = list_of(integer(0, 2**50), 16)
_PIECE = mapping({"shape": _SIZES, "offset": _SIZES}, required=("shape", "offset"))


class _Piece(NamedTuple):
    """size elements at `offset` of a tensor of `shape`, in an open file."""

    file: Any
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]) -> None:
    """Called by every rank. What all ranks hold alike is written once."""
    from safetensors.torch import save_file

    mine: dict[str, Tensor] = {f"random.{_rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        mine[f"random_cuda.{_rank()}"] = torch.cuda.get_rng_state()
    places = {name: {"shape": list(t.shape), "offset": [0]} for name, t in mine.items()}
    for name, value in _tensors(model, optimizer).items():
        local, offset = _local(value)
        if local.numel() and (local is not value or _rank() == 0):
            mine[name] = local
            places[name] = {"shape": list(value.shape), "offset": list(offset)}
    stored = {name: tensor.detach().contiguous().cpu() for name, tensor in mine.items()}
    save_file(stored, folder / f"rank-{_rank():05d}.safetensors", metadata={"places": json.dumps(places)})
    if _rank() == 0:
        (folder / _SCALARS).write_text(json.dumps(scalars, indent=1) + "\n")


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The inverse, on any number of ranks, or in one process without a group. ValueError where the state is not this model's.

    Ranks that the writer did not have keep their random state, so only an equal number of ranks resumes bit for bit.
    """
    parameters = trained(model)
    with ExitStack() as files, torch.no_grad():
        pieces = _open(folder, files)
        _check(folder, {name: found[0].shape for name, found in pieces.items()}, parameters)
        for name, found in pieces.items():
            key, _, parameter = name.partition(".")
            if key in ("random", "random_cuda"):
                continue
            p = parameters.get(parameter)
            if p is None or found[0].shape not in (tuple(p.shape), ()):
                raise CheckpointError(
                    f"{folder} has {name} of shape {list(found[0].shape)}, which no trained parameter of this model has"
                )
            if key == "parameter":
                target: Any = p.detach()
            else:
                dtype = _dtype(found[0], name)
                like = found[0].shape == tuple(p.shape)
                target = torch.zeros_like(p, dtype=dtype) if like else torch.zeros((), dtype=dtype, device=p.device)
                target = optimizer.state[p][key] = target.detach()
            _fill(folder, name, target, found)
        for key, set_state in (("random", torch.set_rng_state), ("random_cuda", torch.cuda.set_rng_state)):
            own = pieces.get(f"{key}.{_rank()}")
            if own is not None and (key == "random" or torch.cuda.is_available()):
                with library_errors(f"{folder} has a random state that torch does not take"):
                    set_state(own[0].file.get_tensor(f"{key}.{_rank()}"))
    return read_scalars(folder / _SCALARS)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, p in trained(model).items():
        found[f"parameter.{name}"] = p.detach()
        for key, value in optimizer.state[p].items():
            found[f"{key}.{name}"] = torch.as_tensor(value)
    return found


def _local(value: Any) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a tensor, and where it begins; a tensor that is not divided is its own part."""
    if not hasattr(value, "to_local"):
        return value, (0,) * value.dim()
    chunks = value.__create_chunk_list__()
    return value.to_local(), tuple(chunks[0].offsets) if chunks else (0,) * value.dim()


def _open(folder: Path, files: ExitStack) -> dict[str, list[_Piece]]:
    from safetensors import safe_open

    pieces: dict[str, list[_Piece]] = {}
    names = sorted(folder.glob("rank-*.safetensors"))
    if not names:
        raise CheckpointError(
            f"{folder} holds no state that is read: neither state.safetensors nor rank-*.safetensors; states of torch's distributed "
            "checkpoints are pickles, which are never opened: start in a new output folder"
        )
    for name in names:
        is_there(name)
        with library_errors(f"{name} is truncated or not a safetensors file", "; resume from another checkpoint"):
            file = files.enter_context(safe_open(name, framework="pt"))
            places = json.loads((file.metadata() or {}).get("places", "{}"))
            stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        if not isinstance(places, dict) or places.keys() != stored.keys():
            raise CheckpointError(f"{name} does not say where its tensors belong; resume from another checkpoint")
        check(places, dict.fromkeys(places, _PIECE), name)
        for key, size in stored.items():
            shape, offset = tuple(places[key]["shape"]), tuple(places[key]["offset"])
            piece = _Piece(file, shape, offset, size)
            whole = len(shape) == len(offset) == len(size) and all(o + n <= s for o, n, s in zip(offset, size, shape))
            if not whole or (key in pieces and pieces[key][0].shape != shape):
                raise CheckpointError(
                    f"{name} has {key} of shape {list(size)} at {list(offset)} of {list(shape)}, which does not fit"
                )
            if not any((other.offset, other.size) == (offset, size) for other in pieces.setdefault(key, [])):
                pieces[key].append(piece)
    return pieces


def _dtype(piece: _Piece, name: str) -> torch.dtype:
    found = piece.file.get_slice(name)
    return found[tuple(slice(0, 0) for _ in piece.size)].dtype if piece.size else piece.file.get_tensor(name).dtype


def _fill(folder: Path, name: str, target: Any, pieces: list[_Piece]) -> None:
    local, first = _local(target)
    covered = 0
    for piece in pieces:
        begin = [max(a, b) for a, b in zip(first, piece.offset)]
        end = [min(a + n, b + m) for a, n, b, m in zip(first, local.shape, piece.offset, piece.size)]
        if any(a >= b for a, b in zip(begin, end)):
            continue
        there = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, piece.offset))
        here = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, first))
        with library_errors(f"{name} in {folder} cannot be read"):
            value = piece.file.get_slice(name)[there] if there else piece.file.get_tensor(name)
        local[here].copy_(value)
        covered += value.numel()
    if covered != local.numel():
        raise CheckpointError(
            f"{folder} has {covered} of the {local.numel()} elements of {name}; a rank's file is not there: copy it too"
        )


def _check(folder: Path, stored: dict[str, tuple[int, ...]], parameters: dict[str, nn.Parameter]) -> None:
    theirs = {name.removeprefix("parameter."): size for name, size in stored.items() if name.startswith("parameter.")}
    ours = {name: tuple(p.shape) for name, p in parameters.items()}
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{folder} is the state of another model or another choice of trained weights: {name} has shape {theirs.get(name)} there and "
            f"{ours.get(name)} here, and {len(different) - 1} more differ; start in a new output folder"
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
