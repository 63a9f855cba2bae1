"""Stored modules that are several here: q, k and v in one matrix, gate and up in one, all experts in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError
from foveate.models.checkpoint.base import Blocks

Value = Tensor | Blocks
Part = Callable[[Value], Value]


def _rows(first: int, end: int, total: int, step: int = 1) -> Part:
    """Rows of a matrix or of a bias that has `total`: a view where there is no step."""

    def part(value: Value) -> Value:
        if isinstance(value, Blocks):
            return Blocks(_held(value.blocks, total)[first:end:step].contiguous(), value.format, value.in_features)
        return _held(value, total)[first:end:step]

    return part


def _held(x: Tensor, total: int) -> Tensor:
    if x.dim() < 1 or x.shape[0] != total:
        raise CheckpointError(f"it has shape {list(x.shape)}, and the config asks for {total} rows")
    return x


def _chosen(index: Tensor, total: int) -> Part:
    def part(value: Value) -> Value:
        if isinstance(value, Blocks):
            return Blocks(_held(value.blocks, total)[index], value.format, value.in_features)
        return _held(value, total)[index]

    return part


def _qkv(name: str, config: Any) -> Iterator[tuple[str, Part]]:
    first, total = 0, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    for part, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads), ("v_proj", config.num_kv_heads)):
        yield part, _rows(first, first + heads * config.head_dim, total)
        first += heads * config.head_dim


def _qkv_by_group(name: str, config: Any) -> Iterator[tuple[str, Part]]:
    """For each KV head its query heads, then its k, then its v."""
    group = config.num_heads // config.num_kv_heads
    rows = torch.arange((group + 2) * config.num_kv_heads * config.head_dim, device="cpu")
    rows = rows.view(config.num_kv_heads, group + 2, config.head_dim)
    for part, index in (("q_proj", rows[:, :group]), ("k_proj", rows[:, group]), ("v_proj", rows[:, group + 1])):
        yield part, _chosen(index.flatten(), rows.numel())


def _qkv_by_head(name: str, config: Any) -> Iterator[tuple[str, Part]]:
    """DeBERTa: each head's q, then its k, then its v."""
    rows = torch.arange(3 * config.hidden_size, device="cpu").view(config.num_heads, 3, -1)
    for i, part in enumerate(("query_proj", "key_proj", "value_proj")):
        yield part, _chosen(rows[:, i].flatten(), rows.numel())


def _query_key_value(name: str, config: Any) -> Iterator[tuple[str, Part]]:
    """NomicBERT: all of q, then all of k, then all of v."""
    size = config.hidden_size
    for i, part in enumerate(("query", "key", "value")):
        yield part, _rows(i * size, (i + 1) * size, 3 * size)


def _gate_up(name: str, config: Any) -> Iterator[tuple[str, Part]]:
    inner = config.intermediate_size
    yield "gate_proj", _rows(0, inner, 2 * inner)
    yield "up_proj", _rows(inner, 2 * inner, 2 * inner)


def _expert(expert: int, count: int, rows: int, then: Part | None = None) -> Part:
    """One of [experts, rows, in]; GGUF's blocks have [experts * rows, in]."""

    def part(value: Value) -> Value:
        if isinstance(value, Blocks):
            value = _rows(expert * rows, (expert + 1) * rows, count * rows)(value)
        elif value.dim() < 2 or value.shape[0] <= expert:
            raise CheckpointError(f"it has shape {list(value.shape)}, and the config asks for expert {expert} of it")
        else:
            value = value[expert]
        return value if then is None else then(value)

    return part


def _experts_gate_up(name: str, config: Any) -> Iterator[tuple[str, Part]]:
    inner = config.experts.inner
    for i in range(config.experts.count):
        yield f"experts.{i}.gate_proj", _expert(i, config.experts.count, 2 * inner, _rows(0, inner, 2 * inner))
        yield f"experts.{i}.up_proj", _expert(i, config.experts.count, 2 * inner, _rows(inner, 2 * inner, 2 * inner))


def _experts(projection: str, rows: Callable[[Any], int]) -> Callable[[str, Any], Iterator[tuple[str, Part]]]:
    def parts(name: str, config: Any) -> Iterator[tuple[str, Part]]:
        for i in range(config.experts.count):
            yield f"experts.{i}.{projection}", _expert(i, config.experts.count, rows(config))

    return parts


def _transposed(then: Part | None = None) -> Part:
    """gpt-oss stores [experts, in, out], but blocks as [experts, out, in]."""

    def part(value: Value) -> Value:
        if isinstance(value, Blocks):
            return value if then is None else then(value)
        if value.dim() != 2:
            raise CheckpointError(f"it has shape {list(value.shape)} for an expert, which must be [in, out]")
        expert = value.t() if then is None else then(value.t())
        return expert.contiguous() if isinstance(expert, Tensor) else expert

    return part


def _oss_gate_up(name: str, config: Any) -> Iterator[tuple[str, Part]]:
    """gpt-oss: rows of gate and up in turns."""
    bias = name.endswith("_bias")
    rows = 2 * config.experts.inner
    for i in range(config.experts.count):
        for first, part in enumerate(("gate_proj", "up_proj")):
            half = _rows(first, rows, rows, 2)
            yield f"experts.{i}.{part}", _expert(i, config.experts.count, rows, half if bias else _transposed(half))


def _oss_down(name: str, config: Any) -> Iterator[tuple[str, Part]]:
    for i in range(config.experts.count):
        yield (
            f"experts.{i}.down_proj",
            _expert(i, config.experts.count, config.hidden_size, None if name.endswith("_bias") else _transposed()),
        )


# By the names in the tables of families: the parts of a module, by the last of their names.
SPLITS: dict[str, Callable[[str, Any], Iterator[tuple[str, Part]]]] = {
    "qkv": _qkv,
    "qkv_by_group": _qkv_by_group,
    "qkv_by_head": _qkv_by_head,
    "query_key_value": _query_key_value,
    "gate_up": _gate_up,
    "experts_gate_up": _experts_gate_up,
    "experts_gate": _experts("gate_proj", lambda config: config.experts.inner),
    "experts_up": _experts("up_proj", lambda config: config.experts.inner),
    "experts_down": _experts("down_proj", lambda config: config.hidden_size),
    "oss_gate_up": _oss_gate_up,
    "oss_gate_up_bias": _oss_gate_up,
    "oss_down": _oss_down,
    "oss_down_bias": _oss_down,
}
