"""K-quants: blocks and panels against the gguf library, the kernel against fp64 with the same rounding, files against expanded weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate import LLM
from foveate.models import load_model
from foveate.nn import PackedLinear
from foveate.ops.packed_linear import quantize_activations
from foveate.quantization import k_blocks
from foveate.quantization.gguf_blocks import dequantize
from foveate.quantization.gguf_types import BLOCKS
from gguf_files import write_llama

gguf = pytest.importorskip("gguf")

FORMATS = tuple(k_blocks.K_FORMATS)
_HEADERS = {
    "Q2_K": (80, 82),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q3_K": (108,),
    "IQ4_XS": (0,),
}  # where the fp16 scales lie


def random_blocks(kind, rows, columns, seed=0):
    """Bytes of random super-blocks with scales of both signs, and their weights as the gguf library reads them."""
    rng = np.random.default_rng(seed)
    if kind == "Q8_K":  # ours, in no file
        d = rng.normal(scale=0.001, size=(rows * columns // 256, 1)).astype(np.float32)
        scales, q = (rng.integers(-128, 128, (len(d), n), dtype=np.int8) for n in (16, 256))
        data = np.concatenate([d.view(np.uint8), scales.view(np.uint8), q.view(np.uint8)], 1)
        weights = (d * scales.astype(np.float32)).repeat(16, 1) * q.astype(np.float32)
        return torch.from_numpy(data.reshape(rows, -1)), torch.from_numpy(weights.reshape(rows, -1))
    elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    data = rng.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    for at in _HEADERS[kind]:
        data[:, at : at + 2] = rng.normal(scale=0.01, size=(len(data), 1)).astype(np.float16).view(np.uint8)
    weights = gguf.dequantize(data.reshape(rows, -1), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(data.reshape(rows, -1).copy()), torch.from_numpy(weights)


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_have_the_weights_of_the_gguf_library(format):
    blocks, expected = random_blocks(format.upper(), 5, 768)
    assert torch.equal(dequantize(blocks, format), expected)


def test_q3_k_as_q6_k_has_the_same_weights():
    blocks, expected = random_blocks("Q3_K", 5, 768)
    assert torch.equal(dequantize(k_blocks.q3_to_q6(blocks), "q6_k"), expected)


@pytest.mark.parametrize("out", [1, 31, 33])
@pytest.mark.parametrize("format", FORMATS)
def test_panels_keep_every_weight(format, out):
    blocks, expected = random_blocks(format.upper(), out, 512)
    layer = PackedLinear.from_blocks(blocks, format, 512)
    assert torch.equal(layer.dequantize(), expected)
    ids = torch.tensor([[out - 1, 0], [out // 2, out - 1]])
    assert torch.equal(layer.rows(ids), expected[ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9, 130])
@pytest.mark.parametrize("format", FORMATS)
def test_the_product_is_that_of_the_rounded_rows(format, rows, dtype):
    """Products of a block are exact integers: what remains is fp32 scaling and the sum over blocks, a few eps of sum |w| |x|."""
    blocks, weight = random_blocks(format.upper(), 70, 768, seed=rows)
    torch.manual_seed(rows)
    x = torch.randn(rows, 768).to(dtype)
    bias = torch.randn(70)
    found = PackedLinear.from_blocks(blocks, format, 768, bias)(x)
    q, dx = quantize_activations(x.float())
    rounded = (q.double() * dx.double()[..., None]).flatten(-2)
    exact = rounded @ weight.double().t() + bias.double()
    # Minima are subtracted from d sc q, so the sum of magnitudes is that of both.
    magnitude = rounded.abs() @ _magnitude(blocks, format).t() + bias.double().abs()
    steps = 768 // 32 + 8
    limit = steps * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * exact.abs()
    assert ((found.double() - exact).abs() <= limit).all()
    assert ((1.05 * exact - exact).abs() > limit).float().mean() > 0.9, "the limit would let 5 % pass"


def _magnitude(blocks, format):
    """fp64 [out, in]: |d sc q| + |dmin mn|; of the others |d sc| times what is stored and its offset, at most"""
    parts = k_blocks._split(blocks.reshape(-1, k_blocks.K_FORMATS[format].block_bytes), format)
    headers, q = parts.headers.double().abs(), parts.q.double()
    if parts.mn is None:
        scales = (headers * parts.sc.double().abs()).repeat_interleave(256 // parts.sc.shape[1], 1)
        return (scales * (256 if format in ("iq4_xs", "q8_k") else q + 32)).view(len(blocks), -1)
    scales, minima = headers[:, :1] * parts.sc.double(), headers[:, 1:] * parts.mn.double()
    size = 256 // scales.shape[1]
    return (scales.repeat_interleave(size, 1) * q + minima.repeat_interleave(size, 1)).view(len(blocks), -1)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_whatever_the_others(format):
    blocks, _ = random_blocks(format.upper(), 64, 512)
    layer = PackedLinear.from_blocks(blocks, format, 512)
    x = torch.randn(9, 512)
    whole = layer(x)
    for rows in (1, 2, 3, 5):
        assert torch.equal(layer(x[:rows]), whole[:rows])


@pytest.mark.parametrize("format", FORMATS)
def test_not_finite_rows_show_and_no_others(format):
    blocks, _ = random_blocks(format.upper(), 40, 512)
    layer = PackedLinear.from_blocks(blocks, format, 512)
    x = torch.randn(3, 512)
    clean = layer(x)
    x[1, 300] = float("nan")
    found = layer(x)
    assert not found[1].isfinite().any() and torch.equal(found[[0, 2]], clean[[0, 2]])


def test_what_does_not_fit_is_said():
    blocks, _ = random_blocks("Q4_K", 4, 512)
    with pytest.raises(ValueError, match="in_features=288 must be a multiple of 256 for q4_k"):
        PackedLinear.from_blocks(blocks, "q4_k", 288)
    with pytest.raises(ValueError, match="q4_k with in_features=256 needs uint8 \\[out, 144\\]"):
        PackedLinear.from_blocks(blocks, "q4_k", 256)
    layer = PackedLinear.from_blocks(blocks, "q4_k", 512)
    with pytest.raises(ValueError, match="x has 288 features; q4_k needs a multiple of 256"):
        layer(torch.randn(1, 288))


# How a type is read: the format that it stays or is repacked in without loss, or None where it is expanded.
TYPES = {
    "Q4_K": "q4_k", "Q5_K": "q5_k", "Q6_K": "q6_k", "Q3_K": "q6_k", "Q5_0": "q8_0", "IQ4_NL": "iq4_nl", "TQ2_0": "q4_0",
    "Q5_1": "q8_m", "Q2_K": "q2_k", "IQ4_XS": "iq4_xs", "IQ3_S": "q8_k", "IQ3_XXS": "q8_k", "IQ2_XXS": "q8_k", "IQ2_XS": "q8_k",
    "IQ2_S": "q8_k", "IQ1_S": "q8_k", "IQ1_M": "q8_k", "TQ1_0": "q4_0", "MXFP4": "mxfp4",
}  # fmt: skip
_D = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "Q5_1": (0, 2),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def test_sizes_of_blocks_are_those_of_the_gguf_library():
    for kind, size in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == size, kind


@pytest.mark.parametrize("kind", TYPES)
def test_files_of_every_type_have_the_gguf_librarys_weights(kind, tmp_path):
    """A model of which one matrix is of this type; the logits of the packed model are near those of the expanded one."""
    number = gguf.GGMLQuantizationType[kind]
    elements, size = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(1)
    data = rng.integers(0, 256, (256 * 512 // elements, size), dtype=np.uint8)
    if kind == "MXFP4":
        data[:, 0] = rng.integers(118, 122, len(data))
    elif kind == "IQ1_M":  # its fp16 scale is spread over the upper bits of four numbers; these make 2**-9
        data[:, 48:56] = np.array([0x0000, 0x0000, 0x8000, 0x1000], "<u2").view(np.uint8)
    else:
        for at in _D.get(kind, (0,)):
            data[:, at : at + 2] = np.float16(0.001).reshape(1).view(np.uint8)
    expected = torch.from_numpy(gguf.dequantize(data.reshape(256, -1), number))
    assert expected.isfinite().all() and expected.abs().max() > 0
    shape = dict(hidden=256, inner=512, heads=4, vocab=64)
    path = write_llama(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": (data.reshape(256, -1), number)}, **shape)
    whole = load_model(path, quantization="none")
    assert torch.equal(whole.model.layers[0].mlp.down_proj.weight, expected)
    packed = load_model(path)
    layer = packed.model.layers[0].mlp.down_proj
    assert layer.format == TYPES[kind] and torch.equal(layer.dequantize(), expected)
    tokens = torch.arange(20)[None]
    a, b = packed(tokens), whole(tokens)
    assert ((a - b).norm() / b.norm()) < 0.02


def test_a_q4_0_file_as_llama_quantize_writes_it(tmp_path):
    """All in q4_0, but for a tied embedding in Q6_K: it is the head too, and its rows are looked up."""
    blocks, weights = random_blocks("Q6_K", 64, 256)
    path = write_llama(tmp_path / "m.gguf", {"token_embd.weight": (blocks.numpy(), gguf.GGMLQuantizationType.Q6_K)}, hidden=256, inner=512,
                       heads=4, vocab=64, rest=gguf.GGMLQuantizationType.Q4_0)  # fmt: skip
    model = load_model(path)
    assert model.lm_head.format == "q6_k" and model.model.layers[0].mlp.up_proj.format == "q4_0"
    assert torch.equal(model.model.embed_tokens(torch.tensor([3, 63])), weights[[3, 63]])
    llm = LLM(path, num_pages=8)
    assert "native" in llm.runs_on
    whole = load_model(path, quantization="none")
    tokens = torch.arange(20)[None]
    assert ((model(tokens) - whole(tokens)).norm() / whole(tokens).norm()) < 0.03
