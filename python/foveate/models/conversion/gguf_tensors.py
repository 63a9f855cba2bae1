"""What the tensors of a model are called in a GGUF file, in which type each is written, and how its rows are arranged there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError
from foveate.models.checkpoint.base import Blocks
from foveate.models.checkpoint.gguf_names import ARCHITECTURES, ENCODERS, MIXTRAL, GgufArchitecture
from foveate.models.quantizing import packed_format
from foveate.quantization.gguf_blocks import dequantize, quantize
from foveate.quantization.gguf_types import FLOATS, PACKED

Value = Tensor | Blocks
FORMATS = {format: kind for kind, format in PACKED.items()}  # "q4_k" -> "Q4_K"
FLOAT_KINDS = {dtype: kind for kind, dtype in FLOATS.items()}
# llama.cpp's mixes: attn_v and ffn_down of half of the layers have two bits more.
MIXES = {"q4_k_m": "q4_k", "q5_k_m": "q5_k"}
_STAY_FLOAT = re.compile(
    r".*(_norm|ffn_gate_inp|ffn_gate_inp_shexp|position_embd|token_types|attn_sinks|rope_\w+)\.\w+"
)
_EXPERT = re.compile(r"(model\.layers\.\d+)\.mlp\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
_FUSED_HERE = {
    "phi3": (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    )
}


class Stored(NamedTuple):
    """A tensor of the file, of one or several of the model's: they are stacked, or put below each other."""

    name: str
    parts: tuple[str, ...]
    stacked: bool = False


def gguf_architecture(model_type: str) -> tuple[str, GgufArchitecture]:
    """The name in files, and its table. CheckpointError where there is none."""
    if model_type == "mistral":
        return "llama", ARCHITECTURES["llama"]
    if model_type == "mixtral":
        return "llama", MIXTRAL
    for name, architecture in ARCHITECTURES.items():
        if architecture.model_type == model_type and model_type not in ENCODERS:
            return name, architecture
    known = sorted({a.model_type for a in ARCHITECTURES.values()} - {*ENCODERS} | {"mistral", "mixtral"})
    raise CheckpointError(
        f"a {model_type} cannot be written as GGUF; known are {', '.join(known)}: --to safetensors takes every architecture"
    )


def stored_tensors(architecture: GgufArchitecture, names: list[str]) -> Iterator[Stored]:
    """The file's tensors in the order of the model's parameters."""
    known = _inverse(architecture, names)
    fused = _FUSED_HERE.get(architecture.model_type, ())
    groups: dict[str, list[str]] = {}
    stacked: set[str] = set()
    for name in names:
        target = name
        if match := _EXPERT.fullmatch(name):
            target = f"{match[1]}.mlp.experts.{match[3]}.{match[4]}"
            stacked.add(target)
        for whole, parts in fused:
            for part in parts:
                if f".{part}." in name:
                    target = name.replace(f".{part}.", f".{whole}.")
        groups.setdefault(target, []).append(name)
    for target, members in groups.items():
        if target not in known:
            raise CheckpointError(
                f"{target} has no name in a GGUF file of {architecture.model_type}; --to safetensors takes it"
            )
        yield Stored(known[target], tuple(members), target in stacked)


def _inverse(architecture: GgufArchitecture, names: list[str]) -> dict[str, str]:
    """{name here: name in the file}, by asking the table of names for all that a layer may have."""
    layers = {int(match[1]) for name in names if (match := re.search(r"\.(?:layers|h)\.(\d+)\.", name))}
    found: dict[str, str] = {}
    for kind in ("weight", "bias"):
        for part in architecture.other_parts():
            found[architecture.huggingface_name(f"{part}.{kind}")] = f"{part}.{kind}"
        for part in architecture.layer_parts():
            for layer in layers:
                name = f"blk.{layer}.{part}.{kind}"
                found[architecture.huggingface_name(name)] = name
    return found


def permute(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] from the order of pairs (c, c + D / 2) to that of pairs (2c, 2c + 1), the way back of `unpermute`."""
    D = rows.shape[0] // heads
    return rows.view(heads, 2, D // 2, -1).transpose(1, 2).reshape(rows.shape)


class Plan(NamedTuple):
    """How matrices are written. quantization: None keeps blocks that GGUF has; dtype: of what is not quantised."""

    quantization: str | None
    dtype: torch.dtype
    tied: bool
    layers: int

    def format_of(self, name: str, shape: tuple[int, ...]) -> str:
        """A block format or a GGUF float type, of a tensor that is a matrix or a stack of matrices."""
        if len(shape) < 2 or shape[-2] == 1 or _STAY_FLOAT.fullmatch(name):
            return "F32"
        base = MIXES.get(self.quantization or "", self.quantization)
        if base in (None, "none"):
            return FLOAT_KINDS[self.dtype]
        wanted = base
        if base != self.quantization and self._gets_more(name):
            wanted = "q6_k"
        head = name == "output.weight" or (self.tied and name == "token_embd.weight")
        format = packed_format("lm_head" if head else "", wanted, shape[-1])
        return format if shape[-1] % 32 == 0 else FLOAT_KINDS[self.dtype]

    def _gets_more(self, name: str) -> bool:
        match = re.fullmatch(r"blk\.(\d+)\.(attn_v|ffn_down(?:_exps)?)\.weight", name)
        if match is None:
            return False
        i, n = int(match[1]), self.layers
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def kind_of(value: Value, name: str, plan: Plan) -> str:
    """The GGUF type that `encode` gives it."""
    if isinstance(value, Blocks) and plan.quantization is None and value.format in FORMATS:
        return FORMATS[value.format]
    format = plan.format_of(name, tuple(value.shape))
    return FORMATS.get(format, format)


def encode(value: Value, kind: str, importance: Tensor | None) -> Tensor:
    """Its bytes as that type: uint8 [rows, bytes], or a float tensor of its shape. bf16 comes as int16."""
    if isinstance(value, Blocks):
        if FORMATS.get(value.format) == kind:
            return value.blocks.contiguous()
        value = dequantize(value.blocks, value.format)
    if kind in FLOATS:
        converted = value.to(FLOATS[kind]).contiguous()
        return converted.view(torch.int16) if kind == "BF16" else converted
    rows = value.reshape(-1, value.shape[-1])
    return quantize(
        rows.float(), PACKED[kind], importance if importance is not None and len(importance) == rows.shape[1] else None
    )


def arranged(value: Value, change: Callable[[Tensor], Tensor]) -> Value:
    """With its rows in another order; a row of blocks moves as a whole."""
    if isinstance(value, Blocks):
        return Blocks(change(value.blocks), value.format, value.in_features)
    return change(value)


def row_order(architecture: GgufArchitecture, stored: str, config: Any) -> Callable[[Tensor], Tensor]:
    """What `GgufWeights` undoes."""
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}.get(stored.split(".")[-2])
    if architecture.permuted and heads:
        return lambda rows: permute(rows, heads)
    if architecture.plus_one and stored.endswith("norm.weight"):
        return lambda weight: weight.float() + 1
    if stored.endswith("ffn_gate_inp_shexp.weight"):
        return lambda weight: weight.flatten()
    return lambda rows: rows
