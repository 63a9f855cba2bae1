"""Packed linear layers: GGUF blocks bit for bit, and the kernel against fp64 with the same rounding of the activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from compare import assert_as_good_as_torch
from foveate.bench.tolerance import linear_floor
from foveate.nn import PackedLinear
from foveate.ops.packed_linear import packed_linear, quantize_activations
from foveate.quantization.gguf_blocks import FORMATS, dequantize, quantize
from foveate.quantization.gguf_types import REPACKED
from poison import guarded_outputs, nan_padded

pytestmark = [pytest.mark.amx, pytest.mark.kernels, pytest.mark.linear_kernels]

gguf = pytest.importorskip("gguf")


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def gguf_blocks(weight: Tensor, format: str) -> Tensor:
    """By the gguf library, which does not quantise to iq4_nl, and whose blocks of MXFP4 have other scales."""
    if format == "iq4_nl":
        return quantize(weight, format)
    blocks = library_blocks(weight, format)
    return REPACKED["MXFP4"][1](blocks) if format == "mxfp4" else blocks


def library_blocks(weight: Tensor, format: str) -> Tensor:
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
    stored = library_blocks(awkward_weight(), format) if format == "mxfp4" else blocks
    expected = gguf.quants.dequantize(stored.numpy(), gguf.GGMLQuantizationType[format.upper()])
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


ALL_FORMATS = ["f32", "bf16", "f16", *FORMATS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_layer(format: str, in_features: int, out_features: int, bias: bool = True) -> PackedLinear:
    weight = random(out_features, in_features, seed=3) / in_features**0.5
    offset = random(out_features, seed=4) if bias else None
    if format in FORMATS:
        return PackedLinear.from_blocks(gguf_blocks(weight, format), format, in_features, offset)
    linear = torch.nn.Linear(in_features, out_features, bias=bias)
    linear.weight.data = weight
    if bias:
        linear.bias.data = offset
    return PackedLinear.from_linear(linear, format)


def rounded(x: Tensor, format: str) -> Tensor:
    """x as the product sees it."""
    if format in FORMATS:
        q, dx = quantize_activations(x.float())
        return (q * dx[..., None]).flatten(-2)
    return x.bfloat16().float() if format == "bf16" else x.float()


def floor(layer: PackedLinear, x: Tensor) -> float:
    return linear_floor(rounded(x, layer.format), layer.dequantize(), layer.bias)


def expected(layer: PackedLinear, x: Tensor, dtype: torch.dtype) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return F.linear(rounded(x, layer.format).to(dtype), layer.dequantize().to(dtype), bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ALL_FORMATS)
def test_against_fp64_with_the_same_rounding(format, dtype):
    for in_features, out_features, bias in (
        (32, 1, True),
        (96, 33, False),
        (576, 64, True),
        (1536, 95, True),
        (64, 130, False),
    ):
        layer = make_layer(format, in_features, out_features, bias)
        for rows in (1, 2, 3, 4, 5, 70):
            x = random(rows, in_features, seed=rows).to(dtype)
            out = layer(x)
            assert out.dtype == dtype
            peer = expected(layer, x, torch.float32).to(dtype)
            name, exact = f"{in_features} x {out_features}, {rows} rows", expected(layer, x, torch.float64)
            assert_as_good_as_torch(out, exact, peer, name=name, floor=floor(layer, x))


@pytest.mark.parametrize("in_features", [1, 2, 31, 129, 257])
@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_odd_sizes_of_float_formats(format, in_features):
    layer, x = make_layer(format, in_features, 45), random(7, in_features)
    peer = expected(layer, x, torch.float32)
    assert_as_good_as_torch(layer(x), expected(layer, x, torch.float64), peer, floor=floor(layer, x))


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_of_activations_is_bounded(format):
    """Each element of x moves by at most dx / 2, so an output by at most the sum of |w| dx / 2."""
    layer, x = make_layer(format, 576, 96, bias=False), random(9, 576, seed=5) * random(9, 576, seed=6).exp()
    weight = layer.dequantize().double()
    dx = (x.unflatten(-1, (-1, 32)).abs().amax(-1) / 127).repeat_interleave(32, -1).double()
    exact = F.linear(x.double(), weight)
    error, bound = (layer(x) - exact).abs(), F.linear(dx / 2, weight.abs())
    assert (error <= bound * 1.001).all()
    assert (error > bound * 1e-3).any()  # the rounding took place


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_rows_do_not_depend_on_their_batch(format):
    layer, x = make_layer(format, 192, 70), random(70, 192, seed=7)
    full = layer(x)
    for rows in range(1, 70):
        assert torch.equal(layer(x[:rows]), full[:rows]), rows
        assert torch.equal(layer(x[rows:]), full[rows:]), rows
    many = layer(x.repeat(16, 1))  # more rows than are prepared at once
    assert torch.equal(many, full.repeat(16, 1))


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_threads_change_no_bit(format):
    layer = make_layer(format, 576, 333)
    saved = torch.get_num_threads()
    try:
        for rows in (1, 5, 300):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(layer(random(rows, 576, seed=8)))
            assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    finally:
        torch.set_num_threads(saved)


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_reads_and_writes_only_its_own(format):
    layer = make_layer(format, 96, 45)
    for dtype in DTYPES:
        x = nan_padded(random(5, 96).to(dtype))
        with guarded_outputs() as guard:
            out = layer(x)
        guard.check()
        assert torch.equal(out, layer(x.clone())) and out.isfinite().all()


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_not_finite_rows_show_and_stay_alone(format):
    layer, x = make_layer(format, 96, 45), random(6, 96)
    clean = layer(x)
    x[1, 40], x[3, 95], x[4, 0] = float("nan"), float("inf"), float("-inf")
    out = layer(x)
    bad = torch.tensor([False, True, False, True, True, False])
    assert not out[bad].isfinite().any()
    assert torch.equal(out[~bad], clean[~bad])


def test_zero_and_tiny_rows():
    layer = make_layer("q4_1", 64, 33, bias=False)
    assert torch.equal(layer(torch.zeros(2, 64)), torch.zeros(2, 33))
    assert layer(torch.full((2, 64), 1e-38)).isfinite().all()


@pytest.mark.parametrize("format", ALL_FORMATS)
def test_native_rounds_as_the_reference(format):
    """Bit-equal int8: with weights of one nonzero element the output is dx q w, so equality means equal rounding."""
    weight = torch.zeros(64, 64)
    weight[torch.arange(64), torch.arange(64)] = 1.0
    linear = torch.nn.Linear(64, 64, bias=False)
    linear.weight.data = weight
    layer = PackedLinear.from_linear(linear, "q8_0" if format in FORMATS else format)
    x = random(500, 64, seed=9)
    native = packed_linear(x, layer.data, layer.format, 64)
    reference = packed_linear(x, layer.data, layer.format, 64, backend="reference")
    torch.testing.assert_close(native, reference, rtol=3e-7, atol=0)


def test_gradient_of_x():
    for format in ALL_FORMATS:
        layer, x = make_layer(format, 64, 40), random(3, 2, 64).requires_grad_()
        dout = random(3, 2, 40, seed=1)
        (dx,) = torch.autograd.grad(layer(x), x, dout)
        torch.testing.assert_close(dx, dout @ layer.dequantize())


def test_op_as_torch_sees_it():
    for format in ALL_FORMATS:
        layer = make_layer(format, 64, 40)
        for backend in ("native", "reference"):
            opcheck(
                torch.ops.foveate.packed_linear.default,
                (random(2, 3, 64), layer.data, format, 40, layer.bias, backend),
            )
    x = random(4, 2, 64)
    assert torch.equal(torch.func.vmap(layer, in_dims=1)(x), layer(x).transpose(0, 1))
    assert layer(x[:0]).shape == (0, 2, 40)
    assert layer(x.transpose(0, 2).contiguous().transpose(0, 2)).equal(layer(x))


def test_moving_and_loading():
    layer = make_layer("q4_1", 64, 40)
    x, before = random(3, 64), layer(random(3, 64))
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.float32 and torch.equal(layer(x), before)
    other = make_layer("q4_1", 64, 40)
    other.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), before)
    assert layer.nbytes == 64 // 32 * 64 * 20 + 40 * 4


def test_errors_are_sentences():
    layer = make_layer("q4_1", 64, 40)
    with pytest.raises(ValueError, match="multiple of 32"):
        layer(random(2, 63))
    with pytest.raises(ValueError, match="need int8"):
        layer(random(2, 96))
    with pytest.raises(TypeError, match=r"must be float32, bfloat16 or float16"):
        layer(random(2, 64).double())
    with pytest.raises(ValueError, match="not a block format"):
        packed_linear(random(2, 64), layer.data, "q5_0", 40)
    with pytest.raises(ValueError, match="bias is"):
        packed_linear(random(2, 64), layer.data, "q4_1", 40, torch.zeros(41))
    with pytest.raises(ValueError, match="multiple of 32"):
        PackedLinear.from_blocks(torch.zeros(4, 20, dtype=torch.uint8), "q4_1", 33)
    with pytest.raises(ValueError, match="needs uint8"):
        PackedLinear.from_blocks(torch.zeros(4, 21, dtype=torch.uint8), "q4_1", 32)
    with pytest.raises(ValueError, match="choose one of q8_0, q4_0, q4_1"):
        quantize(random(2, 32), "mxfp4")
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.full((2, 32), float("nan")), "q8_0")
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(random(2, 33), "q8_0")
    with pytest.raises(TypeError, match="give a format"):
        PackedLinear.from_linear(torch.nn.Linear(32, 32).double())
    with pytest.raises((ValueError, IndexError), match="40"):
        layer.rows(torch.tensor([40]))
    with pytest.raises((ValueError, IndexError), match="-1"):
        layer.rows(torch.tensor([-1]))
