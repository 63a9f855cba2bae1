"""Packed linear layers on the Triton kernels. On the CPU they run under the interpreter: TRITON_INTERPRET=1 at Python's start."""

from __future__ import annotations

import pytest
import torch

import foveate
from compare import assert_as_good_as_torch
from foveate.bench.tolerance import linear_floor
from foveate.nn import PackedLinear
from foveate.ops.packed_linear import TRITON_FORMATS, packed_linear, quantize_activations
from foveate.quantization.gguf_blocks import FORMATS, quantize
from poison import guarded_outputs, nan_padded

if foveate.backends()["triton"] is not None:
    pytest.skip(f"triton: {foveate.backends()['triton']}", allow_module_level=True)

from foveate.backend.triton.packed_linear import quantize_rows, shares, weight_rows

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def _many_shares(monkeypatch):
    """So that small layers are divided too."""
    from foveate.backend.triton import packed_linear as launches

    monkeypatch.setattr(launches, "shares", lambda in_features, *_: max(1, in_features // 64))


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(device: str, format: str, in_features: int, out_features: int) -> PackedLinear:
    weight, bias = random(out_features, in_features, seed=3) / in_features**0.5, random(out_features, seed=4)
    if format == "q4_1":  # d, m and nibbles of each block
        headers = (random(out_features, in_features // 32, 2, seed=5) / in_features**0.5).half()
        nibbles = torch.randint(
            0, 256, (out_features, in_features // 32, 16), generator=torch.Generator().manual_seed(6)
        )
        blocks = torch.cat([headers.view(torch.uint8), nibbles.to(torch.uint8)], -1)
        return PackedLinear.from_blocks(blocks.flatten(1), format, in_features, bias).to(device)
    if format in FORMATS:
        return PackedLinear.from_blocks(quantize(weight, format), format, in_features, bias).to(device)
    linear = torch.nn.Linear(in_features, out_features)
    linear.weight.data, linear.bias.data = weight, bias
    return PackedLinear.from_linear(linear, format).to(device)


def rounded(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """x as the product sees it."""
    if layer.format in FORMATS:
        q, dx = quantize_activations(x.float())
        return (q * dx[..., None]).flatten(-2)
    return x.bfloat16() if layer.format == "bf16" else x


def expected(layer: PackedLinear, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.nn.functional.linear(rounded(layer, x).to(dtype), layer.dequantize().to(dtype), layer.bias.to(dtype))


def floor(layer: PackedLinear, x: torch.Tensor) -> float:
    return linear_floor(rounded(layer, x), layer.dequantize(), layer.bias)


def run(layer, x):
    return packed_linear(x, layer.data, layer.format, layer.out_features, layer.bias, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", TRITON_FORMATS)
def test_against_fp64_with_the_same_rounding(format, dtype, device):
    for in_features, out_features, rows in ((32, 1, 3), (96, 33, 1), (320, 70, 20), (160, 40, 70)):
        layer, x = on(device, format, in_features, out_features), random(rows, in_features, seed=rows).to(dtype)
        out = run(layer, x.to(device))
        assert out.dtype == dtype
        layer, peer = layer.cpu(), expected(layer.cpu(), x, torch.float32).to(dtype)
        name = f"{in_features} x {out_features}, {rows} rows"
        assert_as_good_as_torch(out.cpu(), expected(layer, x, torch.float64), peer, name=name, floor=floor(layer, x))


@pytest.mark.parametrize("in_features", [1, 31, 129])
@pytest.mark.parametrize("format", ["f32", "bf16"])
def test_odd_sizes_of_float_formats(format, in_features, device):
    layer, x = on(device, format, in_features, 45), random(7, in_features)
    out, layer = run(layer, x.to(device)).cpu(), layer.cpu()
    exact, peer = (expected(layer, x, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_good_as_torch(out, exact, peer, floor=floor(layer, x))


@pytest.mark.parametrize("format", TRITON_FORMATS)
def test_rows_do_not_depend_on_their_batch(format, device):
    """Few rows and many take different ways."""
    layer, x = on(device, format, 192, 70), random(40, 192, seed=7).to(device)
    full = run(layer, x)
    for rows in (1, 2, 15, 16, 17):
        assert torch.equal(run(layer, x[:rows]), full[:rows]), rows
        if device != "cpu" or format not in (
            "f32",
            "bf16",
        ):  # numpy's product of floats depends on the row's place in the tile
            assert torch.equal(run(layer, x[-rows:]), full[-rows:]), rows


@pytest.mark.parametrize("rows", [5, 20])
@pytest.mark.parametrize("format", TRITON_FORMATS)
def test_reads_and_writes_only_its_own(format, rows, device):
    layer = on(device, format, 96, 45)
    for dtype in DTYPES:
        x = nan_padded(random(rows, 96).to(dtype).to(device))
        with guarded_outputs() as guard:
            out = run(layer, x)
        guard.check()
        assert torch.equal(out, run(layer, x.clone())) and out.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("rows", [6, 20])
@pytest.mark.parametrize("format", TRITON_FORMATS)
def test_not_finite_rows_show_and_stay_alone(format, rows, device):
    layer, x = on(device, format, 96, 45), random(rows, 96).to(device)
    clean = run(layer, x)
    x[1, 40], x[3, 95], x[4, 0] = float("nan"), float("inf"), float("-inf")
    out = run(layer, x)
    bad = torch.isin(torch.arange(rows), torch.tensor([1, 3, 4]))
    assert not out[bad].isfinite().any()
    assert torch.equal(out[~bad], clean[~bad])


def test_activations_are_rounded_as_the_reference_does(device):
    x = random(3, 32 * 20) * random(3, 32 * 20, seed=2).exp()
    x[0, :32], x[1, 32:64] = 0, 1e-38
    x[2, :64] = torch.arange(-32, 32) / 2  # halves
    x = x.to(device)
    q, dx, sums = (
        torch.empty(3, n, dtype=t, device=device)
        for n, t in ((640, torch.int8), (20, torch.float32), (20, torch.float32))
    )
    quantize_rows[(3, 2)](x, q, dx, sums, x.stride(0), 20, BLOCKS=16)
    expected_q, expected_dx = quantize_activations(x)
    assert torch.equal(q.view(3, 20, 32).float(), expected_q) and torch.equal(dx, expected_dx)
    assert torch.equal(sums, expected_q.sum(-1))


@pytest.mark.parametrize("format", TRITON_FORMATS)
def test_rows_of_the_weight(format, device):
    layer = on(device, format, 96, 45)
    ids = torch.tensor([0, 44, 13, 2**40, -1, -(2**40)], device=device)
    out = torch.full((6, 96), float("nan"), device=device)
    weight_rows(ids, layer.data, format, out, 45)
    assert torch.equal(out, layer.dequantize()[[0, 44, 13, 44, 0, 0]]), "what lies outside is cut off"


@pytest.mark.parametrize("format", TRITON_FORMATS)
def test_gradient_of_x_and_empty_batches(format, device):
    layer, x = on(device, format, 64, 40), random(3, 64).to(device).requires_grad_()
    dout = random(3, 40, seed=1).to(device)
    (dx,) = torch.autograd.grad(run(layer, x), x, dout)
    torch.testing.assert_close(dx, dout @ layer.dequantize())
    assert run(layer, x[:0].detach()).shape == (0, 40)


def test_shares():
    """One token fills the chip: a small layer is divided, a large one is not, and a share is four blocks or more."""
    assert shares(4096, 4096, 132) == 9
    assert shares(4096, 128256, 132) == 1
    assert shares(256, 256, 132) == 2
    assert shares(32, 32, 132) == 1
    assert shares(65536, 32, 132) == 16
