"""Quantisers that search their scales: errors against those of llama.cpp's own, awkward weights, importance matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.nn import PackedLinear
from foveate.quantization.gguf_blocks import dequantize, quantize
from foveate.quantization.names import QUANTISABLE, SEARCHED

# Mean squared errors of llama.cpp's ggml_quantize_chunk (ggml 0.25.3) on `weight()`: plain, and with `importance()` weighted by it.
LLAMA_CPP = {
    "q4_1": (1.9643e-05, 2.5618e-06), "q4_k": (1.6848e-05, 2.6845e-06), "q5_k": (4.3021e-06, 7.4146e-07),
    "q6_k": (1.1370e-06, 1.8993e-07), "iq4_nl": (1.9005e-05, 3.2386e-06),
}  # fmt: skip


def weight():
    rng = np.random.default_rng(0)
    w = rng.standard_t(6, (64, 512)) * 0.03 * rng.uniform(0.5, 2, 512)
    return torch.from_numpy(w.astype(np.float32)), torch.from_numpy(
        (rng.uniform(size=512) ** 4 + 1e-3).astype(np.float32)
    )


def error(format, importance=None, w=None):
    w = weight()[0] if w is None else w
    squares = (dequantize(quantize(w, format, importance), format) - w).square()
    return float((squares if importance is None else squares * importance).mean())


@pytest.mark.parametrize("format", LLAMA_CPP)
def test_errors_are_those_of_llama_cpp_at_most(format):
    plain, weighted = LLAMA_CPP[format]
    assert error(format) < 1.05 * plain
    assert error(format, weight()[1]) < 1.05 * weighted


@pytest.mark.parametrize("format", SEARCHED)
def test_importance_moves_the_errors_to_where_they_cost_less(format):
    w, importance = weight()
    plain, searched = (dequantize(quantize(w, format, i), format) for i in (None, importance))
    costs = [float(((found - w).square() * importance).sum()) for found in (plain, searched)]
    assert costs[1] < 0.95 * costs[0]
    assert torch.equal(quantize(w, format, torch.zeros(512)), quantize(w, format, torch.ones(512)))


@pytest.mark.parametrize("format", SEARCHED)
def test_awkward_rows(format):
    """Zeros, a constant, one element, all positive, all negative, tiny and large: finite, near, and zeros stay zeros."""
    w = torch.randn(9, 512, generator=torch.Generator().manual_seed(1)) * 0.1
    w[0] = 0
    w[1] = 0.25
    w[2] = -0.25
    w[3, :] = 0
    w[3, 77] = 1.0
    w[4] = w[4].abs() + 0.5
    w[5] = -w[5].abs() - 0.5
    w[6] *= 1e-6
    w[7] *= 1e4
    found = dequantize(quantize(w, format), format)
    assert found.isfinite().all() and not found[0].any()
    step = {"q4_1": 16, "q4_k": 8, "q5_k": 16, "q6_k": 32, "iq4_nl": 6}[format]
    limit = w.view(9, -1, 256 if format.endswith("k") else 32).abs().amax(2).amax(1) / step
    assert ((found - w).abs().amax(1)[[1, 2, 3, 4, 5, 7, 8]] <= limit[[1, 2, 3, 4, 5, 7, 8]]).all()
    assert found[6].abs().max() < 1e-4  # where fp16 has few digits


@pytest.mark.parametrize("format", SEARCHED)
def test_rows_do_not_depend_on_each_other_or_on_the_dtype(format):
    w, importance = weight()
    whole = quantize(w, format, importance)
    assert torch.equal(quantize(w[7:9], format, importance), whole[7:9])
    assert torch.equal(quantize(w.bfloat16(), format), quantize(w.bfloat16().float(), format))


@pytest.mark.parametrize("format", QUANTISABLE)
def test_linear_layers_take_every_format(format):
    linear = torch.nn.Linear(512, 40)
    layer = PackedLinear.from_linear(linear, format)
    x = torch.randn(3, 512)
    assert ((layer(x) - linear(x)).norm() / linear(x).norm()) < 0.15
    assert layer.format == format


def test_what_does_not_fit_is_said():
    w, _ = weight()
    with pytest.raises(ValueError, match="importance has shape \\[3\\]; a weight of 512 columns needs \\[512\\]"):
        quantize(w, "q4_k", torch.ones(3))
    with pytest.raises(ValueError, match="in a multiple of 256"):
        quantize(w[:, :288], "q4_k")
