"""Writes GGUF files, tensor after tensor, so that one tensor at a time is in memory; and reads what it wrote, to compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError
from foveate.models.checkpoint.base import Checkpoint, Weights
from foveate.models.checkpoint.gguf import GgufCheckpoint, in_file_order, open_gguf
from foveate.models.checkpoint.gguf_file import GgufTensor
from foveate.models.checkpoint.reading import read_config
from foveate.models.conversion.gguf_metadata import add_model, file_type
from foveate.models.conversion.gguf_tensors import (
    FLOAT_KINDS,
    FORMATS,
    Plan,
    Value,
    arranged,
    encode,
    gguf_architecture,
    kind_of,
    row_order,
    stored_tensors,
)
from foveate.models.loading import match_names, model_class, unfilled_model
from foveate.models.rotary import Rotary
from foveate.quantization.gguf_types import BLOCKS
from foveate.tokenizer.gguf_export import add_tokenizer


class _Entry(NamedTuple):
    """A tensor to be written: shape, the type in the file, and its bytes, which are made when they are asked for."""

    name: str
    shape: tuple[int, ...]
    kind: str
    data: Callable[[], Tensor]


def from_model(
    checkpoint: Checkpoint, out: Path, quantization: str | None, dtype: torch.dtype, importance: Mapping[str, Tensor],
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """A Hugging Face folder as `out`."""
    import gguf

    model, weights = unfilled_model(checkpoint)
    sources = match_names(model, weights, str(checkpoint.path))
    config, model_type = model.config, checkpoint.config["model_type"]
    arch, architecture = gguf_architecture(model_type)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer, which a GGUF file needs; put the model's tokenizer.json beside it"
        )
    plan = Plan(quantization, dtype, "lm_head.weight" in model.tied, config.num_layers)
    writer = gguf.GGUFWriter(None, arch)
    writer.add_name(checkpoint.path.name)
    _add_general(writer, quantization, dtype)
    ropes = add_model(writer, arch, config, model_type)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    entries = [_Entry(name, tuple(t.shape), "F32", lambda t=t: t) for name, t in ropes.items()]  # type: ignore[misc]
    read = _reader(weights, sources, model)
    for stored in stored_tensors(architecture, [name for name in sources if name not in model.tied]):
        change = row_order(architecture, stored.name, config)

        def value(stored: Any = stored, change: Any = change) -> list[Value]:
            return [arranged(read(part), change) for part in stored.parts]

        entries.append(_entry(stored, value, plan, importance))
    _write(writer, out, entries, advance)
    _compare(checkpoint, out)


def from_gguf(
    checkpoint: GgufCheckpoint, out: Path, quantization: str | None, dtype: torch.dtype, importance: Mapping[str, Tensor],
    advance: Callable[[int], None],
) -> None:  # fmt: skip
    """A GGUF file as another: all of its metadata, and its tensors, those that stay as they are byte by byte."""
    import gguf

    reader = gguf.GGUFReader(checkpoint.path)
    arch = checkpoint.file.fields["general.architecture"]
    writer = gguf.GGUFWriter(None, arch)
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "split.")) or key in ("general.architecture", "general.file_type"):
            continue
        writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    if quantization is None:
        writer.add_file_type(checkpoint.file.fields.get("general.file_type", 0))
    else:
        _add_general(writer, quantization, dtype)
    weights: Any = checkpoint.weights()
    names = {tensor.name: name for name, tensor in weights.tensors.items()}
    layers = checkpoint.config.get("num_hidden_layers") or checkpoint.config["n_layer"]
    plan = Plan(quantization, dtype, "output.weight" not in checkpoint.file.tensors, layers)
    entries = []
    for tensor in checkpoint.file.tensors.values():
        name = names.get(tensor.name)
        format = plan.format_of(tensor.name, tensor.shape)
        kept = (
            name is None or quantization is None or len(tensor.shape) < 2 or (format == "F32" and tensor.kind == "F32")
        )
        if kept:
            entries.append(_Entry(tensor.name, tensor.shape, tensor.kind, lambda t=tensor: t.data))  # type: ignore[misc]
            continue
        kind = FORMATS.get(format, format)
        if kind == tensor.kind:
            entries.append(_Entry(tensor.name, tensor.shape, kind, lambda t=tensor: t.data))  # type: ignore[misc]
            continue
        found = importance.get(str(name).removesuffix(".weight"))

        def data(tensor: GgufTensor = tensor, kind: str = kind, found: Any = found) -> Tensor:
            return encode(in_file_order(tensor), kind, found)

        entries.append(_Entry(tensor.name, tensor.shape, kind, data))
    _write(writer, out, entries, advance)
    open_gguf(out)


def _add_general(writer: Any, quantization: str | None, dtype: torch.dtype) -> None:
    plain = quantization in (None, "none")
    writer.add_file_type(file_type(FLOAT_KINDS[dtype] if plain else str(quantization)))
    if not plain:
        writer.add_quantization_version(2)


def _reader(weights: Weights, sources: Mapping[str, str], model: Any) -> Callable[[str], Value]:
    """Values by the names of the model's parameters, matrices as [out, in]."""

    def read(name: str) -> Value:
        value = weights.get(sources[name])
        turned = model.transposed is not None and model.transposed.fullmatch(name) is not None
        if isinstance(value, Tensor) and value.dim() == 2 and turned and not weights.linear_layout:
            return value.t().contiguous()
        return value

    return read


def _entry(stored: Any, values: Callable[[], list[Value]], plan: Plan, importance: Mapping[str, Tensor]) -> _Entry:
    first = values()
    shape = tuple(first[0].shape)
    if stored.stacked:
        shape = (len(first), *shape)
    elif len(first) > 1:
        shape = (sum(value.shape[0] for value in first), *shape[1:])
    if len({kind_of(value, stored.name, plan) for value in first}) > 1 and plan.quantization is None:
        raise CheckpointError(f"{stored.name} would be of several types; give a quantization")
    kind = (
        kind_of(first[0], stored.name, plan)
        if not stored.stacked
        else _kind_of_stack(first[0], stored.name, shape, plan)
    )
    del first

    def data() -> Tensor:
        found = [importance.get(part.removesuffix(".weight")) for part in stored.parts]
        parts = [encode(value, kind, weights) for value, weights in zip(values(), found)]
        return (
            parts[0]
            if len(parts) == 1 and not stored.stacked
            else torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        )

    return _Entry(stored.name, shape, kind, data)


def _kind_of_stack(value: Value, name: str, shape: tuple[int, ...], plan: Plan) -> str:
    if len(shape) == 2:  # biases of experts
        return "F32"
    return kind_of(value, name, plan)


def _write(writer: Any, out: Path, entries: list[_Entry], advance: Callable[[int], None]) -> None:
    import gguf
    import numpy as np

    for entry in entries:
        elements, size = BLOCKS[entry.kind]
        total = int(np.prod(entry.shape))
        kind = gguf.GGMLQuantizationType[entry.kind]
        if elements == 1:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), total * size, raw_dtype=kind)
        else:
            rows = (*entry.shape[:-1], entry.shape[-1] // elements * size)
            writer.add_tensor_info(entry.name, rows, np.dtype(np.uint8), total // elements * size, raw_dtype=kind)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for entry in entries:
            data = entry.data()
            writer.write_tensor_data(data.contiguous().numpy())
            advance(int(np.prod(entry.shape)))
    finally:
        writer.close()


def _compare(checkpoint: Checkpoint, out: Path) -> None:
    """CheckpointError where the file does not say what the config says: of something that GGUF's metadata have no key for."""
    kind: Any = model_class(checkpoint.config)
    wanted = read_config(kind, checkpoint.config, checkpoint.path)
    written = open_gguf(out)
    found = read_config(model_class(written.config), written.config, out)
    for field in dataclasses.fields(wanted):
        a, b = getattr(wanted, field.name), getattr(found, field.name)
        if field.name in (
            "rope_scaling",
            "local_rope_scaling",
            "attention_dropout",
            "dropout",
            "embed_dropout",
            "tied",
        ):
            continue
        if not _same(a, b):
            raise CheckpointError(
                f"{field.name} of {checkpoint.path} is {a!r:.200}, for which GGUF's metadata have no place (they would say {b!r:.200}); "
                "--to safetensors keeps it"
            )
    if hasattr(wanted, "rope_theta") and not _same_rope(wanted, found):
        raise CheckpointError(
            f"rope_scaling of {checkpoint.path} has no place in GGUF's metadata; --to safetensors keeps it"
        )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(_same(x, y) for x, y in zip(a, b))
    if (isinstance(a, str) or a is None) and (isinstance(b, str) or b is None) and a != b:
        gelus = {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"}
        return a in gelus and b in gelus
    return a == b


def _same_rope(a: Any, b: Any) -> bool:
    first, second = (Rotary(c.rotary_dim or c.head_dim, c.max_positions, c.rope_theta, c.rope_scaling) for c in (a, b))
    return torch.allclose(first.frequencies, second.frequencies, rtol=1e-5) and abs(first.factor - second.factor) < 1e-5
