"""One quantised module of a safetensors file, of any of the methods of `quantized`: its tensors as Blocks or, expanded, as fp32.

GPTQ                 qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales [groups, out], g_idx [in]
                     w = scale (q - (zero + 1)), of checkpoint_format "gptq_v2" scale (q - zero)
AWQ                  qweight int32 [in, out / 8], qzeros int32 [groups, out / 8], scales [groups, out]     w = scale (q - zero)
compressed-tensors   weight_packed int32 [out, in * bits / 32], weight_scale [out, groups], weight_zero_point     w = scale (q - zero)
fp8, w8a8            weight e4m3 or int8 [out, in], weight_scale or weight_scale_inv of tensor, rows, groups or tiles     w = scale q
bitsandbytes         weight uint8 of nibbles, absmax for each 64 or more in the order of rows     w = quant_map[q] absmax
                     weight int8 [out, in], SCB [out]     w = q SCB / 127
MLX                  weight uint32 [out, in * bits / 32], scales and biases [out, groups]     w = scale q + bias
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError, shown
from foveate.models.checkpoint.base import Blocks
from foveate.models.checkpoint.mxfp4 import mxfp4_of
from foveate.quantization import integers
from foveate.quantization.scaled_blocks import SCALED, join

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CODES = (torch.int8, torch.uint8, torch.int32, torch.uint32, E4M3, E5M2)
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Module:
    """tensors: by the ends of their names. settings: those of the config."""

    name: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def matrix(self, part: str, *dtypes: torch.dtype) -> Tensor:
        value = self.tensors[part]
        if value.dim() != 2 or value.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise CheckpointError(f"{part} is {value.dtype} {list(value.shape)}; it must be a matrix of {names}")
        return value

    def numbers(self, part: str) -> Tensor:
        """Scales, floating and finite."""
        value = self.tensors[part]
        if value.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not value.numel():
            raise CheckpointError(
                f"{part} is {value.dtype} {list(value.shape)}; scales are float32, float16 or bfloat16"
            )
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{part} has numbers that are not finite")
        return value


@dataclass
class Expanded:
    """fp32 [out, in] of a module for which no packed format has exactly the weights. why: a few words for the warning."""

    weight: Tensor
    why: str


def check_settings(method: str, settings: dict[str, Any], where: Path) -> None:
    """CheckpointError for settings under which the tensors mean something that is not read here."""
    if method in ("gptq", "gptqmodel"):
        bits = settings.get("bits", 4)
        if bits not in (2, 3, 4, 8):
            raise CheckpointError(f"{where} is GPTQ with bits={shown(bits)}; 2, 3, 4 and 8 can be read")
        form = settings.get("checkpoint_format", "gptq")
        if form not in ("gptq", "gptq_v2"):
            raise CheckpointError(
                f"{where} is GPTQ with checkpoint_format={shown(form)}; gptq and gptq_v2 can be read: take another file of the model"
            )
    elif method == "awq":
        bits = settings.get("bits", settings.get("w_bit", 4))
        if bits != 4:
            raise CheckpointError(f"{where} is AWQ with bits={shown(bits)}; 4 can be read")
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise CheckpointError(
                f"{where} is AWQ with version={version!r}, whose words are in another order; gemm, the usual one, can be read"
            )
    elif method == "compressed-tensors":
        sparsity = settings.get("sparsity_config") or {}
        if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
            raise CheckpointError(
                f"{where} is of compressed-tensors with sparsity of format {shown(sparsity['format'])}; dense weights can be read"
            )
    elif method == "mlx" and settings.get("bits", 4) not in (2, 4, 8):
        raise CheckpointError(f"{where} is of MLX with bits={shown(settings['bits'])}; 2, 4 and 8 can be read")


# ---- integers ---------------------------------------------------------------------------------------------------------------------


def gptq(module: Module) -> Blocks | Expanded:
    bits = module.settings.get("bits", 4)
    scales = module.numbers(".scales")
    words, zeros = module.matrix(".qweight", torch.int32), module.matrix(".qzeros", torch.int32)
    columns, out = words.shape[0] * 32 // bits, words.shape[1]
    groups = _groups(columns, scales, out, module, along=0)
    if zeros.shape != (groups, math.ceil(out * bits / 32)):
        raise CheckpointError(
            f".qzeros is {list(zeros.shape)}; {groups} groups of {out} features need {[groups, out * bits // 32]}"
        )
    q = integers.unpack_words(words, bits, 0).t().contiguous()
    zero = integers.unpack_words(zeros, bits, 1)[:, :out].short()
    if module.settings.get("checkpoint_format", "gptq") == "gptq":
        zero = (zero + 1) & (2**bits - 1)  # a zero of 0 is stored as the largest
    order = module.tensors.get(".g_idx")
    return _integers(q, scales.t(), zero.t(), bits, _order(order, columns, groups), "GPTQ")


def awq(module: Module) -> Blocks | Expanded:
    scales = module.numbers(".scales")
    words, zeros = module.matrix(".qweight", torch.int32), module.matrix(".qzeros", torch.int32)
    columns, out = words.shape[0], 8 * words.shape[1]
    groups = _groups(columns, scales, out, module, along=0)
    if zeros.shape != (groups, out // 8):
        raise CheckpointError(
            f".qzeros is {list(zeros.shape)}; {groups} groups of {out} features need {[groups, out // 8]}"
        )
    q = integers.unpack_awq(words).t().contiguous()
    return _integers(q, scales.t(), integers.unpack_awq(zeros).t(), 4, None, "AWQ")


def _groups(columns: int, scales: Tensor, out: int, module: Module, along: int) -> int:
    """How many groups of columns there are, `along` which dimension of the scales."""
    if scales.dim() != 2 or scales.shape[1 - along] != out or scales.shape[along] < 1 or columns % scales.shape[along]:
        wanted = "[groups, out]" if along == 0 else "[out, groups]"
        raise CheckpointError(
            f"the scales are {list(scales.shape)}; {out} features of {columns} columns need {wanted} with groups of whole columns"
        )
    groups = scales.shape[along]
    said = module.settings.get("group_size", module.settings.get("q_group_size"))
    if isinstance(said, int) and said > 0 and said * groups != columns and said < columns:
        raise CheckpointError(
            f"the config says groups of {said} columns, and there are {groups} scales for {columns}; take the config of these weights"
        )
    return groups


def _order(order: Tensor | None, columns: int, groups: int) -> Tensor | None:
    """int64 [in], the group of each column, or None where neighbours share one."""
    if order is None:
        return None
    order = order.long().reshape(-1)
    if len(order) != columns or int(order.min()) < 0 or int(order.max()) >= groups:
        raise CheckpointError(f".g_idx has {len(order)} groups of 0 to {groups - 1}; there are {columns} columns")
    return None if torch.equal(order, torch.arange(columns) // (columns // groups)) else order


def _integers(
    q: Tensor, scale: Tensor, zero: Tensor, bits: int, order: Tensor | None, method: str
) -> Blocks | Expanded:
    if order is not None:
        return Expanded(integers.dequantize_integers(q, scale, zero, order), f"{method} in the order of activations")
    found = integers.blocks_of_integers(q, scale, zero, bits)
    if found is None:
        why = f"{method} in groups or rows that are no multiple of 32"
        return Expanded(integers.dequantize_integers(q, scale, zero), why)
    return Blocks(found[1], found[0], q.shape[1])


def packed_weight(module: Module) -> Blocks | Expanded:
    """compressed-tensors' pack-quantized, nvfp4-pack-quantized and mxfp4-pack-quantized."""
    words = module.tensors[".weight_packed"]
    if words.dtype is torch.uint8:
        return _packed_floats(module)
    words = module.matrix(".weight_packed", torch.int32)
    scale = module.numbers(".weight_scale")
    out = words.shape[0]
    shape = module.tensors.get(".weight_shape")
    if shape is None or shape.numel() != 2:
        raise CheckpointError(".weight_shape is missing, or not two numbers")
    rows, columns = (int(x) for x in shape.reshape(-1))
    bits = next((b for b in (4, 8, 2) if words.shape[1] == math.ceil(columns * b / 32)), 0)
    if rows != out or not bits:
        raise CheckpointError(
            f".weight_packed is {list(words.shape)} and .weight_shape [{rows}, {columns}]; 2, 4 and 8 bits can be read"
        )
    q = integers.unpack_words(words, bits, 1)[:, :columns].contiguous()
    scale = scale.expand(out, 1) if scale.numel() == 1 else scale
    groups = _groups(columns, scale, out, module, along=1)
    zero = torch.full((1, 1), 2 ** (bits - 1), dtype=torch.int16).expand(out, groups)
    if (stored := module.tensors.get(".weight_zero_point")) is not None:
        if stored.dtype is torch.int32:
            zero = integers.unpack_words(stored, bits, 0)[:out].short()
        else:
            zero = stored.short() + 2 ** (bits - 1)
        if zero.numel() == 1:
            zero = zero.reshape(1, 1).expand(out, groups)
        if zero.shape != (out, groups):
            raise CheckpointError(f".weight_zero_point is {list(stored.shape)}; {out} features need {groups} each")
    order = _order(module.tensors.get(".weight_g_idx"), columns, groups)
    return _integers(q, scale, zero, bits, order, "compressed-tensors")


def mlx(module: Module) -> Blocks | Expanded:
    bits = module.settings.get("bits", 4)
    words = module.tensors[".weight"]
    if words.dtype is torch.uint32:
        words = words.view(torch.int32)
    if words.dim() != 2 or words.dtype is not torch.int32:
        raise CheckpointError(f".weight is {words.dtype} {list(words.shape)}; it must be a matrix of uint32")
    scale, minimum = module.numbers(".scales"), module.numbers(".biases")
    columns = words.shape[1] * 32 // bits
    _groups(columns, scale, len(words), module, along=1)
    if minimum.shape != scale.shape:
        raise CheckpointError(f".biases is {list(minimum.shape)}, and .scales {list(scale.shape)}")
    q = integers.unpack_words(words, bits, 1)
    found = integers.blocks_with_minimum(q, scale, minimum, bits)
    if found is not None:
        return Blocks(found[1], found[0], columns)
    weight = integers.dequantize_integers(q, scale, None) + integers.expand_groups(minimum.float(), columns)
    return Expanded(weight, "MLX with numbers that fp16 has not exactly")


# ---- 8 bits with scales beside them -----------------------------------------------------------------------------------------------


def scaled_weight(module: Module) -> Blocks | Expanded:
    codes = module.matrix(".weight", torch.int8, E4M3, E5M2)
    part = ".weight_scale_inv" if ".weight_scale_inv" in module.tensors else ".weight_scale"
    scale = _scale_of_rows(module.numbers(part), codes.shape, module.settings)
    if codes.dtype is torch.int8:
        zero = module.tensors.get(".weight_zero_point")
        q = codes.view(torch.uint8) ^ 128
        whole = torch.full((1, 1), 128, dtype=torch.int16).expand(len(q), scale.shape[1])
        if zero is not None:
            whole = _scale_of_rows(zero.short() + 128, codes.shape, module.settings)
            whole = whole.expand(len(q), scale.shape[1])
        return _integers(q, scale, whole, 8, None, "int8")
    if bool(codes.float().isnan().any()):
        raise CheckpointError(".weight has elements that are NaN")
    if codes.dtype is E5M2:
        return Expanded(codes.float() * integers.expand_groups(scale.float(), codes.shape[1]), "fp8 e5m2")
    blocks = integers.blocks_of_floats(codes, scale)
    if blocks is None:
        columns = torch.arange(codes.shape[1]) * scale.shape[1] // codes.shape[1]
        return Expanded(codes.float() * scale.float()[:, columns], "fp8 in rows or groups that are no multiple of 64")
    return Blocks(blocks, "f8", codes.shape[1])


def _scale_of_rows(scale: Tensor, shape: torch.Size, settings: dict[str, Any]) -> Tensor:
    """[out, groups of columns] of scales of the tensor, of rows, of groups, or of tiles, by default of 128 x 128."""
    out, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(out, 1)
    if scale.dim() == 1 and len(scale) == out:
        return scale[:, None]
    if scale.dim() == 2 and scale.shape[0] == out and columns % scale.shape[1] == 0:
        return scale
    size = settings.get("weight_block_size") or _block_structure(settings) or [128, 128]
    if scale.dim() == 2 and _are_sizes(size):
        tall, wide = size
        if scale.shape == (math.ceil(out / tall), math.ceil(columns / wide)):
            rows = scale.repeat_interleave(tall, 0)[:out]
            if columns % wide == 0:
                return rows
            step = math.gcd(wide, columns)  # the last tile is narrower: scales of neighbours of a common width
            return rows.repeat_interleave(wide // step, 1)[:, : columns // step]
    raise CheckpointError(
        f"the scales are {list(scale.shape)}; a weight of {[out, columns]} has one, one for each row or group, or one for each tile of "
        f"{shown(size)}"
    )


def _are_sizes(size: object) -> TypeGuard[list[int]]:
    return isinstance(size, list) and len(size) == 2 and all(isinstance(x, int) and 1 <= x <= 2**20 for x in size)


def _block_structure(settings: dict[str, Any]) -> object:
    """compressed-tensors' tiles."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("block_structure"):
            return weights["block_structure"]
    return None


# ---- codes for floats ---------------------------------------------------------------------------------------------------------------


def _packed_floats(module: Module) -> Blocks | Expanded:
    codes, scale = module.matrix(".weight_packed", torch.uint8), module.tensors[".weight_scale"]
    out, columns = codes.shape[0], 2 * codes.shape[1]
    if scale.dtype is torch.uint8 and scale.shape == (out, columns // 32):
        blocks = mxfp4_of(codes.view(out, -1, 16), scale, module.name)
        return Blocks(blocks.view(out, -1), "mxfp4", columns)
    whole = module.tensors.get(".weight_global_scale")
    if scale.dtype is not E4M3 or scale.shape != (out, columns // 16) or whole is None or whole.numel() != 1:
        raise CheckpointError(
            f".weight_packed is uint8 {list(codes.shape)} with scales of {scale.dtype} {list(scale.shape)}; NVFP4 has e4m3 for each 16 and "
            "a global scale, MXFP4 uint8 for each 32"
        )
    q = torch.stack([codes & 15, codes >> 4], 2).flatten(1)
    table = torch.tensor([*_FP4_VALUES, *(-x for x in _FP4_VALUES)])
    weight = table[q.long()] * integers.expand_groups(scale.float() / whole.float().reshape(()), columns)
    return Expanded(weight, "NVFP4")


def bitsandbytes_4bit(module: Module) -> Blocks | Expanded:
    kind = next(part for part in module.tensors if "quant_state" in part).rpartition("__")[2]
    state = _quant_state(module)
    out, columns = state["shape"]
    size = state["blocksize"]
    codes = module.tensors[".weight"].reshape(-1)
    absmax = module.tensors[".weight.absmax"].reshape(-1)
    if (
        codes.dtype is not torch.uint8
        or 2 * len(codes) != out * columns
        or len(absmax) != math.ceil(out * columns / size)
    ):
        raise CheckpointError(
            f".weight is {codes.dtype} of {len(codes)} bytes with {len(absmax)} scales; {[out, columns]} in blocks of {size} need uint8 of "
            f"{out * columns // 2} with {math.ceil(out * columns / size)}"
        )
    if absmax.dtype is torch.uint8:
        absmax = _nested(module, absmax, state)
    absmax = absmax.float()
    if not bool(absmax.isfinite().all()):
        raise CheckpointError(".weight.absmax has numbers that are not finite")
    table = module.tensors[".weight.quant_map"].float().reshape(-1)
    known = torch.tensor(SCALED[kind].table)
    if table.shape != known.shape:
        raise CheckpointError(f".weight.quant_map has {len(table)} numbers; {kind} has 16")
    if torch.equal(table, known) and columns % 64 == 0 and size % 64 == 0:
        scale = absmax.repeat_interleave(size // 64)[: out * columns // 64]
        return Blocks(join(kind, codes.view(out, -1), scale.view(out, -1)), kind, columns)
    q = torch.stack([codes >> 4, codes & 15], 1).flatten()
    weight = table[q.long()] * absmax.repeat_interleave(size)[: out * columns]
    return Expanded(
        weight.view(out, columns), f"{kind} in rows or blocks that are no multiple of 64, or with a table of its own"
    )


def _quant_state(module: Module) -> dict[str, Any]:
    part = next(part for part in module.tensors if "quant_state" in part)
    try:
        state = json.loads(bytes(module.tensors[part].to(torch.uint8).tolist()).decode())
        rows, columns = (int(x) for x in state["shape"])
        size = int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{part} is not the description that bitsandbytes writes ({error!r})") from None
    if not (1 <= rows <= 2**31 and 1 <= columns <= 2**31 and 2 <= size <= 2**20):
        raise CheckpointError(f"{part} says a shape of {[rows, columns]} in blocks of {size}")
    return {**state, "shape": (rows, columns), "blocksize": size}


def _nested(module: Module, codes: Tensor, state: dict[str, Any]) -> Tensor:
    """fp32 absmax of 8-bit codes for it."""
    parts = (".weight.nested_absmax", ".weight.nested_quant_map")
    size, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if any(part not in module.tensors for part in parts) or not isinstance(size, int) or not isinstance(offset, float):
        raise CheckpointError(
            "its scales are quantised, and one of nested_absmax, nested_quant_map, nested_blocksize and nested_offset lacks"
        )
    scale, table = (module.tensors[part].float().reshape(-1) for part in parts)
    if len(table) != 256 or size < 1 or len(scale) != math.ceil(len(codes) / size):
        raise CheckpointError(f"nested_absmax has {len(scale)} numbers for {len(codes)} scales in blocks of {size}")
    return table[codes.long()] * scale.repeat_interleave(size)[: len(codes)] + offset


def bitsandbytes_8bit(module: Module) -> Blocks | Expanded:
    codes, scale = module.matrix(".weight", torch.int8), module.numbers(".SCB").float().reshape(-1)
    if len(scale) != len(codes):
        raise CheckpointError(f".SCB has {len(scale)} numbers for {len(codes)} rows")
    zero = torch.full((1, 1), 128, dtype=torch.int16).expand(len(codes), 1)
    return _integers(codes.view(torch.uint8) ^ 128, (scale / 127)[:, None], zero, 8, None, "int8")
