"""Small checkpoints as GPTQ, AWQ, compressed-tensors, fp8, bitsandbytes and MLX write them, made bit by bit from the formats' definitions.

`quantize_folder` takes a folder with float weights and rewrites its linear layers; the weights that they stand for come back in fp32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Parts = dict[str, Tensor]


def words(q: np.ndarray, bits: int) -> Tensor:
    """int32 [n * bits / 32, m] of integers [n, m]: along the first dimension, the lowest bits first, one bit after the other."""
    n, m = q.shape
    stream = np.zeros((n * bits, m), np.uint64)
    for i in range(n):
        for bit in range(bits):
            stream[i * bits + bit] = (q[i] >> bit) & 1
    out = np.zeros((n * bits // 32, m), np.uint64)
    for i in range(n * bits):
        out[i // 32] |= stream[i] << np.uint64(i % 32)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


def _affine(
    w: np.ndarray, bits: int, group: int, symmetric: bool, dtype: Any = np.float16
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [out, in], scale and zero [out, groups]"""
    top = 2**bits - 1
    blocks = w.reshape(len(w), -1, group)
    if symmetric:
        scale = 2 * np.abs(blocks).max(2) / top
        zero = np.full(scale.shape, (top + 1) // 2)
    else:
        low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
        scale = (high - low) / top
        zero = np.clip(np.round(-low / scale), 0, top)
    scale = scale.astype(dtype)
    q = np.clip(np.round(blocks / scale.astype(np.float32)[..., None]) + zero[..., None], 0, top)
    return q.reshape(w.shape).astype(np.int64), scale, zero.astype(np.int64)


def _values(q: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    group = q.shape[1] // scale.shape[1]
    return np.repeat(scale.astype(np.float32), group, 1) * (q - np.repeat(zero, group, 1)).astype(np.float32)


def gptq(
    w: np.ndarray, bits: int = 4, group: int = 32, symmetric: bool = True, v2: bool = False, order: bool = False
) -> tuple[Parts, np.ndarray]:
    group = w.shape[1] if group < 0 else group
    places = np.arange(w.shape[1])
    if order:
        places = np.random.default_rng(0).permutation(w.shape[1])
    q, scale, zero = _affine(w[:, places], bits, group, symmetric)
    values = np.empty_like(w)
    values[:, places] = _values(q, scale, zero)
    stored = np.empty_like(q)
    stored[:, places] = q
    groups = np.empty(w.shape[1], np.int32)
    groups[places] = np.arange(w.shape[1]) // group
    zeros = zero if v2 else (zero - 1) % 2**bits
    return {
        ".qweight": words(stored.T, bits), ".qzeros": words(zeros, bits).t().contiguous(),
        ".scales": torch.from_numpy(scale.T.copy()), ".g_idx": torch.from_numpy(groups),
    }, values  # fmt: skip


def awq(w: np.ndarray, group: int = 32) -> tuple[Parts, np.ndarray]:
    q, scale, zero = _affine(w, 4, group, symmetric=False)

    def packed(x: np.ndarray) -> Tensor:
        """[n, out] -> int32 [n, out / 8]: nibble i of a word is column (0 2 4 6 1 3 5 7)[i] of 8"""
        out = np.zeros((x.shape[0], x.shape[1] // 8), np.uint32)
        for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            out |= x[:, column::8].astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(out.view(np.int32))

    parts = {".qweight": packed(q.T), ".qzeros": packed(zero.T), ".scales": torch.from_numpy(scale.T.copy())}
    return parts, _values(q, scale, zero)


def pack_quantized(w: np.ndarray, bits: int = 4, group: int = 32, symmetric: bool = True) -> tuple[Parts, np.ndarray]:
    q, scale, zero = _affine(w, bits, group, symmetric, np.float32)
    scale = torch.from_numpy(scale).bfloat16()
    parts = {
        ".weight_packed": words(q.T, bits).t().contiguous(), ".weight_scale": scale,
        ".weight_shape": torch.tensor(w.shape),
    }  # fmt: skip
    if not symmetric:
        parts[".weight_zero_point"] = words(zero, bits)
    return parts, _values(q, scale.float().numpy(), zero)


def int8(w: np.ndarray, dtype: torch.dtype = torch.float32) -> tuple[Parts, np.ndarray]:
    scale = torch.from_numpy(np.abs(w).max(1, keepdims=True) / 127).to(dtype)
    q = np.clip(np.round(w / scale.float().numpy()), -128, 127).astype(np.int8)
    return {".weight": torch.from_numpy(q), ".weight_scale": scale}, q.astype(np.float32) * scale.float().numpy()


def _e4m3(w: np.ndarray, scale: np.ndarray) -> Tensor:
    return torch.from_numpy(w / scale).to(torch.float8_e4m3fn)


def fp8(w: np.ndarray, of: str = "row") -> tuple[Parts, np.ndarray]:
    scale = np.abs(w).max(1, keepdims=True) / 448 if of == "row" else np.abs(w).max(keepdims=True) / 448
    scale = scale.astype(np.float32)
    q = _e4m3(w, scale)
    stored = torch.from_numpy(scale if of == "row" else scale.reshape(1))
    return {".weight": q, ".weight_scale": stored, ".input_scale": torch.ones(1)}, q.float().numpy() * scale


def fp8_tiles(w: np.ndarray, size: int = 128) -> tuple[Parts, np.ndarray]:
    rows, columns = -(-w.shape[0] // size), -(-w.shape[1] // size)
    scale = np.empty((rows, columns), np.float32)
    whole = np.empty_like(w)
    for i in range(rows):
        for j in range(columns):
            tile = np.s_[i * size : (i + 1) * size, j * size : (j + 1) * size]
            scale[i, j] = np.abs(w[tile]).max() / 448
            whole[tile] = scale[i, j]
    q = _e4m3(w, whole)
    return {".weight": q, ".weight_scale_inv": torch.from_numpy(scale)}, q.float().numpy() * whole


_NORMAL = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
_FLOAT4 = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]


def bitsandbytes_4bit(
    w: np.ndarray, kind: str = "nf4", nested: bool = True, size: int = 64
) -> tuple[Parts, np.ndarray]:
    table = np.array(_NORMAL if kind == "nf4" else [*_FLOAT4, *(-x for x in _FLOAT4)], np.float32)
    table = table / np.abs(table).max()
    blocks = w.reshape(-1, size)
    absmax = np.abs(blocks).max(1)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "dtype": "float32", "shape": list(w.shape)}
    parts: Parts = {}
    if nested:
        offset = float(absmax.mean())
        codes = torch.linspace(-1, 1, 256)
        centred = absmax - offset
        chunks = np.array([np.abs(c).max() for c in np.split(centred, range(256, len(centred), 256))], np.float32)
        index = np.abs((centred / np.repeat(chunks, 256)[: len(centred)])[:, None] - codes.numpy()[None]).argmin(1)
        parts = {
            ".weight.absmax": torch.from_numpy(index.astype(np.uint8)), ".weight.nested_absmax": torch.from_numpy(chunks),
            ".weight.nested_quant_map": codes,
        }  # fmt: skip
        state |= {"nested_blocksize": 256, "nested_offset": offset, "nested_dtype": "float32"}
        absmax = (
            codes[torch.from_numpy(index)] * torch.from_numpy(chunks).repeat_interleave(256)[: len(index)] + offset
        ).numpy()
    else:
        parts[".weight.absmax"] = torch.from_numpy(absmax)
    q = np.abs((blocks / absmax[:, None])[..., None] - table).argmin(2).astype(np.uint8).reshape(-1)
    parts[".weight"] = torch.from_numpy(q[::2] << 4 | q[1::2])[:, None]
    parts[".weight.quant_map"] = torch.from_numpy(table)
    parts[f".weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    return parts, (table[q].reshape(-1, size) * absmax[:, None]).reshape(w.shape)


def bitsandbytes_8bit(w: np.ndarray) -> tuple[Parts, np.ndarray]:
    largest = np.abs(w).max(1).astype(np.float32)
    q = np.round(127 * w / largest[:, None]).astype(np.int8)
    parts = {
        ".weight": torch.from_numpy(q),
        ".SCB": torch.from_numpy(largest),
        ".weight_format": torch.zeros((), dtype=torch.uint8),
    }
    return parts, q.astype(np.float32) * (largest / np.float32(127))[:, None]


def mlx(w: np.ndarray, bits: int = 4, group: int = 64) -> tuple[Parts, np.ndarray]:
    blocks = w.reshape(len(w), -1, group)
    low = blocks.min(2).astype(np.float16)
    scale = ((blocks.max(2) - low) / (2**bits - 1)).astype(np.float16)
    q = np.clip(
        np.round((blocks - low.astype(np.float32)[..., None]) / scale.astype(np.float32)[..., None]), 0, 2**bits - 1
    )
    values = q.astype(np.float32) * scale.astype(np.float32)[..., None] + low.astype(np.float32)[..., None]
    packed = words(q.reshape(w.shape).T.astype(np.int64), bits).t().contiguous()
    parts = {".weight": packed.view(torch.uint32), ".scales": torch.from_numpy(scale), ".biases": torch.from_numpy(low)}
    return parts, values.reshape(w.shape)


def quantize_folder(
    folder: Path, make: Callable[[np.ndarray], tuple[Parts, np.ndarray]], settings: dict[str, Any],
    chosen: Callable[[str], bool] = lambda name: name.endswith("_proj.weight"), key: str = "quantization_config",
) -> dict[str, Tensor]:  # fmt: skip
    """{stored name: fp32 weights} of the linear layers that were replaced; the config gets `settings`."""
    file = folder / "model.safetensors"
    stored, expected, new = load_file(file), {}, {}
    for name, value in stored.items():
        if not chosen(name):
            new[name] = value
            continue
        parts, values = make(value.float().numpy())
        expected[name] = torch.from_numpy(values)
        new |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
    save_file(new, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: settings}))
    return expected
