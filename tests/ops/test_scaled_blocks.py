"""Blocks for other libraries' formats and Q2_K: panels keep every weight, and products are those of fp64 with the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.nn import PackedLinear
from foveate.ops.packed_linear import packed_linear, quantize_activations
from foveate.quantization.gguf_blocks import dequantize
from foveate.quantization.scaled_blocks import ON_FLOATS, SCALED, join
from poison import guarded_outputs, nan_padded

pytestmark = [pytest.mark.amx, pytest.mark.kernels, pytest.mark.linear_kernels]

FORMATS = tuple(SCALED)
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495,
    0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]


def blocks_and_weights(format: str, out: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of random codes, their weights by the formula of each format, and the size of what each weight is made of."""
    rng = np.random.default_rng(seed)
    size = SCALED[format].block
    count = columns // size
    d = torch.from_numpy(rng.normal(scale=0.01, size=(out, count)).astype(np.float32)).to(SCALED[format].scale)
    wide = d.float().repeat_interleave(size, 1)
    if format == "f8":
        codes = torch.from_numpy(rng.integers(0, 256, (out, columns), dtype=np.uint8))
        codes[(codes & 127) == 127] = 0  # NaN
        weight = wide * codes.view(torch.float8_e4m3fn).float()
        return join(format, codes, d), weight, weight.abs()
    if format in ("nf4", "fp4"):
        q = torch.from_numpy(rng.integers(0, 16, (out, columns), dtype=np.uint8))
        table = torch.tensor(NF4 if format == "nf4" else [*FP4, *(-x for x in FP4)])
        weight = wide * table[q.long()]
        return join(format, q[:, ::2] << 4 | q[:, 1::2], d), weight, weight.abs()
    levels = 16 if format == "q4_z" else 256
    q = torch.from_numpy(rng.integers(0, levels, (out, columns), dtype=np.uint8))
    if format == "q8_m":
        second = torch.from_numpy(rng.normal(size=(out, count)).astype(np.float16))
        weight = wide * q.float() + second.float().repeat_interleave(size, 1)
        magnitude = wide.abs() * q.float() + second.float().abs().repeat_interleave(size, 1)
    else:
        second = torch.from_numpy(rng.integers(0, levels + 1, (out, count)).astype(np.float16))
        weight = wide * (q.float() - second.float().repeat_interleave(size, 1))
        magnitude = weight.abs()
    codes = q
    if format == "q4_z":
        halves = q.view(out, count, 2, 16)
        codes = (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)
    return join(format, codes, d, second), weight, magnitude


def rounded(x: Tensor, format: str) -> Tensor:
    """x as the product sees it, fp64."""
    if format in ON_FLOATS:
        return x.double()
    q, dx = quantize_activations(x.float())
    return (q.double() * dx.double()[..., None]).flatten(-2)


@pytest.mark.parametrize("out", [1, 31, 33, 70])
@pytest.mark.parametrize("format", FORMATS)
def test_blocks_and_panels_keep_every_weight(format, out):
    blocks, expected, _ = blocks_and_weights(format, out, 192)
    assert torch.equal(dequantize(blocks, format), expected)
    layer = PackedLinear.from_blocks(blocks, format, 192)
    assert torch.equal(layer.dequantize(), expected)
    ids = torch.tensor([[out - 1, 0], [out // 2, out - 1]])
    assert torch.equal(layer.rows(ids), expected[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_products_are_those_of_fp64(format, dtype):
    """Of integers they are exact; what remains is fp32 scaling and summing, a few eps of sum |w| |x|."""
    for rows, columns, out in (
        (1, 64, 1),
        (2, 192, 33),
        (3, 576, 64),
        (4, 128, 95),
        (5, 64, 45),
        (9, 1536, 70),
        (70, 192, 40),
    ):
        blocks, weight, magnitude = blocks_and_weights(format, out, columns, seed=rows)
        torch.manual_seed(rows)
        x, bias = torch.randn(rows, columns).to(dtype), torch.randn(out)
        layer = PackedLinear.from_blocks(blocks, format, columns, bias)
        exact = rounded(x, format) @ weight.double().t() + bias.double()
        limit = (64 + columns / 32) * torch.finfo(torch.float32).eps * (
            rounded(x, format).abs() @ magnitude.double().t() + bias.double().abs()
        ) + torch.finfo(dtype).eps * exact.abs()
        for backend in ("native", "reference"):
            found = packed_linear(x, layer.data, format, out, layer.bias, backend=backend)
            assert found.dtype is dtype
            assert ((found.double() - exact).abs() <= limit).all(), (rows, columns, out, backend)
        assert ((1.05 * exact - exact).abs() > limit).float().mean() > 0.7, "the limit would let 5 % pass"


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_whatever_the_others_and_the_threads(format):
    blocks, _, _ = blocks_and_weights(format, 70, 192)
    layer, x = PackedLinear.from_blocks(blocks, format, 192), torch.randn(70, 192)
    whole = layer(x)
    for rows in (1, 2, 3, 4, 5, 8, 17, 69):
        assert torch.equal(layer(x[:rows]), whole[:rows]) and torch.equal(layer(x[rows:]), whole[rows:]), rows
    saved = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(layer(x), whole)
    finally:
        torch.set_num_threads(saved)


@pytest.mark.parametrize("format", FORMATS)
def test_reads_and_writes_only_its_own_and_faults_stay_alone(format):
    blocks, _, _ = blocks_and_weights(format, 45, 128)
    layer = PackedLinear.from_blocks(blocks, format, 128)
    x = torch.randn(6, 128)
    with guarded_outputs() as guard:
        out = layer(nan_padded(x))
    guard.check()
    assert torch.equal(out, layer(x)) and out.isfinite().all()
    broken = x.clone()
    broken[1, 40], broken[3, 127], broken[4, 0] = float("nan"), float("inf"), float("-inf")
    found = layer(broken)
    if format not in ON_FLOATS:  # of these a weight of 0 may meet an infinity
        assert not found[[1, 3, 4]].isfinite().any()
    assert found[1].isnan().all() and torch.equal(found[[0, 2, 5]], out[[0, 2, 5]])


def test_all_codes_of_f8_are_those_of_torch():
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes[(codes & 127) == 127] = 0
    layer = PackedLinear.from_blocks(join("f8", codes, torch.ones(4, 1)), "f8", 64)
    assert torch.equal(layer(torch.eye(64)), codes.view(torch.float8_e4m3fn).float().t())


def test_what_does_not_fit_is_said():
    blocks, _, _ = blocks_and_weights("nf4", 4, 128)
    with pytest.raises(ValueError, match="in_features=96 must be a multiple of 64 for nf4"):
        PackedLinear.from_blocks(blocks, "nf4", 96)
    with pytest.raises(ValueError, match=r"f8 with in_features=64 needs uint8 \[out, 68\]"):
        PackedLinear.from_blocks(blocks, "f8", 64)
