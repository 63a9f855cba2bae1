"""How much memory a model and its cache need, and how much there is."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.models import Checkpoint
from foveate.models.checkpoint.reading import check_layers, read_config
from foveate.models.loading import checked_dtype, model_class
from foveate.models.quantizing import packed_format
from foveate.quantization.gguf_blocks import block_size
from foveate.quantization.names import QUANTISABLE

_SMALLER = ("q8_0", "q4_0")  # what is proposed where a model does not fit


def available(device: torch.device) -> int | None:
    """Bytes that can be taken now; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min([*limits, *_cgroups(), *_process_limits()], default=None)


def _process_limits() -> Iterator[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return
    pages = [int(text) for text in statm.read_text().split()]
    for kind, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield max(0, limit - used * resource.getpagesize())


def _cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What the limits of the process's control groups leave, version 2 and 1, of each group up to the root."""
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        top = root / "memory" if controllers else root
        group = top / path.lstrip("/")
        for folder in [g for g in (group, *group.parents) if g == top or top in g.parents]:
            limit, used = (folder / name for name in names)
            if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
                yield max(0, int(text) - int(used.read_text()))


def model_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None, quantization: str | None) -> int:
    """What the weights take after `load_model` with these options."""
    kind: Any = model_class(checkpoint.config)
    config, stored = read_config(kind, checkpoint.config, checkpoint.path), checkpoint.weights()
    check_layers(config, stored.names(), checkpoint.path)
    with torch.device("meta"):
        model = kind(config)
    packed = stored.linear_layout or getattr(stored, "packed", False)
    if quantization is None and (dtype is None or packed):  # blocks stay blocks
        return stored.loaded_bytes
    size = (dtype or _stored_dtype(checkpoint)).itemsize
    total = sum(p.numel() for p in model.parameters())  # a tied head counts once
    if quantization not in QUANTISABLE:
        return total * size
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    linears = {name: m.weight.numel() for name, m in layers.items()}
    blocks = {name: block_size(packed_format(name, quantization, m.in_features)) for name, m in layers.items()}
    packed = sum(n // blocks[name][0] * blocks[name][1] for name, n in linears.items())
    tied = sum(p.numel() for name, p in model.named_parameters() if name in model.tied.values())
    return packed + (total - sum(linears.values()) + tied) * size


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    return (None if name is None or checkpoint.path.is_file() else checked_dtype(name)) or torch.float32


def check_model_fits(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None, quantization: str | None
) -> bool:
    """Whether the weights fit the memory that is free. False for a mixture of experts that does not, but stays a view of its mapped file.

    ValueError, with what would fit, for any other model that is larger.
    """
    have = available(device)
    need = model_bytes(checkpoint, dtype, quantization)
    if have is None or need <= have:
        return True
    if device.type == "cpu" and quantization is None and _experts_stay_mapped(checkpoint, dtype):
        return False
    smaller = {q: model_bytes(checkpoint, dtype, q) for q in _SMALLER if q != quantization}
    fits = [f'quantization="{q}" needs {gigabytes(size)}' for q, size in smaller.items() if size < need]
    cure = " and ".join(fits) if fits else "no quantization makes it smaller; choose a smaller model"
    raise ValueError(
        f"{checkpoint.path.name} needs {gigabytes(need)} of memory for its weights, and {gigabytes(have)} are free on {device}: {cure}"
    )


def _experts_stay_mapped(checkpoint: Checkpoint, dtype: torch.dtype | None) -> bool:
    """Not those of quantised files, which are packed as they are loaded, nor gpt-oss's, whose rows change their order."""
    config = read_config(model_class(checkpoint.config), checkpoint.config, checkpoint.path)
    if getattr(config, "experts", None) is None or checkpoint.config.get("model_type") == "gpt_oss":
        return False
    stored = checkpoint.weights()
    packed = stored.linear_layout or getattr(stored, "packed", False)
    return not packed and dtype in (None, _stored_dtype(checkpoint))


def cache_sizes(config: Any) -> dict[str, Any]:
    """What a PagedKVCache for the model is told."""
    return {
        "num_layers": config.num_layers, "num_kv_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "head_dim_v": getattr(config, "head_dim_v", None), "values_in_keys": getattr(config, "latent", None) is not None,
    }  # fmt: skip


def token_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of cache for one token: keys and values of all layers, and a scale for each head of int8 and fp8."""
    scale = 4 if dtype.itemsize == 1 else 0
    sizes = cache_sizes(config)
    values = 0 if sizes["values_in_keys"] and not scale else sizes["head_dim_v"] or config.head_dim
    return config.num_layers * config.num_kv_heads * ((config.head_dim + values) * dtype.itemsize + 2 * scale)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
