"""Packed linear layers: GGUF blocks bit for bit, and the kernel against fp64 with the same rounding of the activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.linear import FORMATS, dequantize, quantize
from foveate.nn import PackedLinear

gguf = pytest.importorskip("gguf")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def gguf_blocks(weight: Tensor, format: str) -> Tensor:
    return torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[format.upper()]))


def awkward_weight() -> Tensor:
    """Rows of zeros, of equal magnitudes with both signs, of tiny and of large numbers, of halves that round."""
    w = random(64, 96, seed=1)
    w[0] = 0
    w[1] = torch.tensor([1.0, -1.0]).repeat(48)
    w[2] = torch.tensor([-1.0, 1.0]).repeat(48)
    w[3] *= 1e-6
    w[4] *= 1e4
    w[5] = (torch.arange(96) % 32 - 16) / 2
    w[6, :32] = 0
    return w


@pytest.mark.parametrize("format", ["q8_0", "q4_0"])
def test_quantize_equals_gguf(format):
    for weight in (awkward_weight(), random(256, 256, seed=2, scale=0.02)):
        assert torch.equal(quantize(weight, format), gguf_blocks(weight, format))


@pytest.mark.parametrize("format", FORMATS)
def test_dequantize_equals_gguf(format):
    blocks = gguf_blocks(awkward_weight(), format)
    expected = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[format.upper()])
    assert np.array_equal(dequantize(blocks, format).numpy(), expected)


@pytest.mark.parametrize("out_features", [1, 31, 32, 33, 70])
@pytest.mark.parametrize("format", FORMATS)
def test_packing_keeps_every_block(format, out_features):
    blocks = gguf_blocks(random(out_features, 96), format)
    layer = PackedLinear.from_blocks(blocks, format, 96)
    assert torch.equal(layer.dequantize(), dequantize(blocks, format))
    ids = torch.tensor([[0, out_features - 1], [out_features // 2, 0]])
    assert torch.equal(layer.rows(ids), dequantize(blocks, format)[ids])


@pytest.mark.parametrize("in_features", [1, 7, 96])
def test_packing_of_floats(in_features):
    for dtype in (torch.float32, torch.bfloat16):
        linear = torch.nn.Linear(in_features, 45, dtype=dtype)
        layer = PackedLinear.from_linear(linear)
        assert layer.format == ("f32" if dtype == torch.float32 else "bf16")
        assert torch.equal(layer.dequantize(), linear.weight.float())
