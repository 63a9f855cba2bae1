"""The Triton kernels compile for chips that are not here, and none spills more than what is listed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import foveate

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton without its interpreter", allow_module_level=True)

import triton
import triton.backends.nvidia
import triton.language as tl

from aot import compiling
from foveate.backend.triton import config
from foveate.backend.triton.copy_pages import copy_pages
from foveate.backend.triton.packed_linear import weight_rows
from foveate.ops.packed_linear import packed_linear

ARCHS = [80, 90, 100, "gfx942"]
# Bytes that a block may have.
SHARED = {80: 166912, 86: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536, "gfx1100": 65536}
# Bytes of stack per thread by (kernel, arch, dtype, head dim), where they are not 0. A new one, or more bytes, is a slower kernel.
STACK = {
    ("attention_dkv", 80, "bf16", 64): 8,
    ("attention_dkv", 80, "bf16", 128): 24,
    ("attention_forward", 80, "bf16", 256): 136,
    ("attention_dkv", 86, "bf16", 128): 40,
    ("attention_forward", 86, "bf16", 256): 208,
    ("attention_dkv", 90, "bf16", 64): 320,  # with cu_seqlens
    ("attention_dkv", 90, "bf16", 80): 40,
    ("attention_dkv", 90, "bf16", 128): 16,
    ("attention_forward", 90, "bf16", 256): 56,
    ("attention_dq", 90, "bf16", 256): 120,
    ("attention_dkv", 90, "fp32", 64): 8,
    ("attention_dkv", 120, "bf16", 128): 40,
    ("attention_forward", 120, "bf16", 256): 144,
    ("attention_dkv", "gfx942", "bf16", 256): 20,
    ("attention_dkv", "gfx1100", "bf16", 128): 540,
}
HALF, SINGLE = torch.bfloat16, torch.float32
NAMES = {HALF: "bf16", SINGLE: "fp32"}


def tensors(
    dtype: torch.dtype, d: int, dv: int | None = None, rows: int = 256, heads: int = 2
) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(1, rows, heads, d, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(1, 256, 2, n, dtype=dtype, requires_grad=True) for n in (d, dv or d))
    return q, k, v


def check(found, arch: int | str, dtype: torch.dtype, d: int, more: int = 0) -> None:
    spilled = {kernel: STACK.get((kernel.name, arch, NAMES[dtype], d), 0) + more for kernel in found}
    spilled = {kernel: listed for kernel, listed in spilled.items() if kernel.stack > listed}
    assert not spilled, f"{arch}, {NAMES[dtype]}, head dim {d}: more stack than the listed bytes: {spilled}"
    for kernel in found:
        assert kernel.shared <= SHARED[arch], f"{kernel} needs more shared memory than {arch} has"


# fp32 works with the same instructions on every chip of NVIDIA's, so one of them stands for all.
SIZES = (
    [(arch, HALF, d) for arch in ARCHS for d in (64, 128, 256)]
    + [(90, HALF, d) for d in (40, 80, 96, 192)]
    + [(90, SINGLE, d) for d in (64, 128, 256)]
    + [(arch, HALF, d) for arch in (86, 120) for d in (128, 256)]  # little shared memory
    + [("gfx942", HALF, 96), ("gfx942", SINGLE, 64), ("gfx1100", HALF, 64), ("gfx1100", HALF, 128)]
)


@pytest.mark.parametrize(("arch", "dtype", "d"), SIZES, ids=str)
def test_attention(arch, dtype, d, tmp_path):
    q, k, v = tensors(dtype, d)
    with compiling(arch, tmp_path) as found:
        foveate.attention(q, k, v, causal=True, backend="triton").sum().backward()
    assert [kernel.name for kernel in found] == ["attention_forward", "attention_rows", "attention_dq", "attention_dkv"]
    check(found, arch, dtype, d)
    for listing in tmp_path.glob("*/attention_*.ptx"):
        code = listing.read_text()
        assert "tf32" not in code
        assert not re.search(r"\b(atom|red)\.", code), "a sum by atomics has no fixed order"
    if (arch, dtype) == (90, HALF) and d in (64, 128):
        for kernel in ("attention_forward", "attention_dq", "attention_dkv"):
            check_pipeline(next(tmp_path.glob(f"*/{kernel}.ptx")))


def check_pipeline(listing: Path) -> None:
    """Asynchronous copies and products, and products that ptxas does not put in a row: it does, and says so, where one is under way while
    something else writes to the registers of its sum."""
    code = listing.read_text()
    assert "cp.async" in code
    assert "wgmma.mma_async" in code
    ptxas = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", listing, "-o", listing.with_suffix(".o")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "registers" in said
    assert "serialized" not in said


def test_attention_with_every_option(tmp_path):
    """Head dims of two parts each, GQA, and all operands of the scores with their gradients."""
    q, k, v = tensors(HALF, 96, 80, rows=200, heads=6)
    bias = torch.zeros(1, 6, 1, 256, dtype=HALF, requires_grad=True)
    table, sinks = torch.zeros(32, 6, requires_grad=True), torch.zeros(6, requires_grad=True)
    with compiling(90, tmp_path) as found:
        out, lse = foveate.attention(
            q, k, v, causal=True, window=(100, -1), softcap=20.0, bias=bias, mask=torch.ones(1, 1, 1, 256, dtype=torch.bool),
            alibi_slopes=torch.ones(6), relative_bias=foveate.RelativeBias(table, bidirectional=True, max_distance=128), sinks=sinks,
            kv_lens=torch.tensor([200]), dropout_p=0.1, return_lse=True, backend="triton",
        )  # fmt: skip
        (out.sum() + lse.sum()).backward()
    names = ["attention_forward", "attention_rows", "attention_dq", "attention_dkv", "attention_dbias"]
    assert [kernel.name for kernel in found] == names


@pytest.mark.parametrize(("rows", "d"), [(1, 64), (5, 1)])
def test_strides_of_one(rows, d, tmp_path):
    """The compiler takes an argument of 1 as a constant: heads of lse are 1 apart with one query, rows of q with one head of dim 1."""
    heads = 4 if d > 1 else 1
    q = torch.zeros(2, rows, heads, d, dtype=HALF, requires_grad=True)
    k, v = (torch.zeros(2, 100, max(1, heads // 2), d, dtype=HALF, requires_grad=True) for _ in range(2))
    bias, sinks = torch.zeros(1, 1, rows, 1, dtype=HALF, requires_grad=True), torch.zeros(heads, requires_grad=True)
    with compiling(90, tmp_path) as found:
        foveate.attention(q, k, v, window=(3, 3), bias=bias, sinks=sinks, backend="triton").sum().backward()
        foveate.attention(q, k, v, causal=True, backend="triton").sum().backward()
    assert len(found) == 9


def test_varlen_and_packed_heads(tmp_path):
    """One query row a sequence: the 8 query heads of a KV head are rows of one program."""
    q, k, v = tensors(HALF, 64, rows=2, heads=16)
    with compiling(90, tmp_path) as found:
        cu_q, cu_k = torch.tensor([0, 1, 2]), torch.tensor([0, 100, 256])
        out = foveate.attention_varlen(q[0], k[0], v[0], cu_q, cu_k, 1, 156, causal=True, backend="triton")
        out.sum().backward()
    check(found, 90, HALF, 64)
    assert len(found) == 4


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("storage", [HALF, torch.int8, torch.float8_e4m3fn], ids=str)
def test_decode(arch, storage, tmp_path):
    pages = torch.zeros(64, 16, 2, 128).to(storage)
    scale = None if storage == HALF else torch.zeros(64, 16, 2)
    q, new = torch.zeros(1, 1, 8, 128, dtype=HALF), torch.zeros(1, 1, 2, 128, dtype=HALF)
    angles = torch.zeros(1024, 32)
    with compiling(arch, tmp_path) as found:
        foveate.attention_with_kv_cache(
            q, pages, pages.clone(), k=new, v=new, kv_lens=torch.tensor([900]), block_table=torch.arange(64, dtype=torch.int32)[None],
            rotary_cos=angles, rotary_sin=angles, k_scale=scale, v_scale=None if scale is None else scale.clone(), backend="triton",
        )  # fmt: skip
        copy_pages(pages[None], [0], [1])
    assert [kernel.name for kernel in found] == ["append_rows", "decode_split", "decode_combine", "copy_words"]
    check(found, arch, HALF, 128)


@pytest.mark.parametrize("arch", [86, "gfx942"])
def test_decode_of_wide_heads(arch, tmp_path):
    """DeepSeek's 576 and 512, where shared memory is short."""
    k_cache, v_cache = (torch.zeros(64, 16, 1, d, dtype=HALF) for d in (576, 512))
    with compiling(arch, tmp_path) as found:
        foveate.attention_with_kv_cache(
            torch.zeros(1, 4, 16, 576, dtype=HALF), k_cache, v_cache, kv_lens=torch.tensor([900]),
            block_table=torch.arange(64, dtype=torch.int32)[None], backend="triton",
        )  # fmt: skip
    check(found, arch, HALF, 576)


@pytest.mark.parametrize("arch", ARCHS)
def test_rows(arch, tmp_path):
    x, weight = torch.zeros(4, 20000, dtype=HALF, requires_grad=True), torch.ones(20000, dtype=HALF, requires_grad=True)
    q = torch.zeros(1, 4, 8, 128, dtype=HALF, requires_grad=True)
    with compiling(arch, tmp_path) as found:
        for row in (x, x[:, :1000]):
            foveate.softmax(row, mask=row > 0, bias=row, backend="triton").sum().backward()
            foveate.log_softmax(row, backend="triton").sum().backward()
            foveate.cross_entropy(
                row, torch.zeros(4, dtype=torch.int64), softcap=5.0, backend="triton"
            ).sum().backward()
        foveate.rms_norm(x, weight, 1e-5, backend="triton").sum().backward()
        sum(t.sum() for t in foveate.rms_norm(x, weight, 1e-5, residual=x, backend="triton")).backward()
        for interleaved in (False, True):
            turned = foveate.apply_rotary(
                q, q, torch.zeros(4, 48), torch.zeros(4, 48), interleaved=interleaved, backend="triton"
            )
            (turned[0].sum() + turned[1].sum()).backward()
    assert len({kernel.name for kernel in found}) == 8
    check(found, arch, HALF, 128)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("format", ["f32", "bf16", "q8_0", "q4_0", "q4_1"])
def test_packed_linear(format, arch, tmp_path):
    from foveate.quantization.panels import packed_bytes

    data, x = torch.zeros(packed_bytes(format, 4096, 64), dtype=torch.int8), torch.zeros(64, 4096, dtype=HALF)
    with compiling(arch, tmp_path) as found:
        for rows in (x[:1], x):
            packed_linear(rows, data, format, 64, backend="triton")
        weight_rows(torch.zeros(3, dtype=torch.int64), data, format, torch.zeros(3, 4096), 64)
    assert {kernel.name for kernel in found} - {"quantize_rows"} == {"packed_product", "add_shares", "packed_rows"}
    check(found, arch, HALF, 128)


@triton.jit
def document_mask(score, b, h, i, j, aux):
    return tl.where(tl.load(aux[0] + i) == tl.load(aux[0] + j), score, float("-inf"))


@triton.jit
def same(score, grad, b, h, i, j, aux):
    return grad


@pytest.mark.parametrize("arch", ARCHS)
def test_score_mod(arch, tmp_path):
    q, k, v = tensors(HALF, 128)
    mod = {"score_mod": document_mask, "score_mod_bwd": same, "score_mod_aux": [torch.zeros(256, dtype=torch.int32)]}
    with compiling(arch, tmp_path) as found:
        foveate.attention(q, k, v, causal=True, **mod, backend="triton").sum().backward()
    assert [kernel.name for kernel in found] == ["attention_forward", "attention_rows", "attention_dq", "attention_dkv"]
    check(found, arch, HALF, 128, {80: 56, 90: 32}.get(arch, 0))


def test_another_score_mod_is_another_kernel(tmp_path):
    """Two functions of one name: what is remembered by the compiler goes by what they do."""

    def made(sign):
        if sign:

            @triton.jit
            def mod(score, b, h, i, j, aux):
                return score + 1.0

        else:

            @triton.jit
            def mod(score, b, h, i, j, aux):
                return score - 1.0

        return mod

    q, k, v = (x.detach() for x in tensors(HALF, 64))
    with compiling(90, tmp_path):
        for sign in (0, 1, 1, 0):
            foveate.attention(q, k, v, score_mod=made(sign), backend="triton")
    assert len(list(tmp_path.glob("*/attention_forward.cubin"))) == 2


@pytest.mark.parametrize("variant", [config.DESCRIPTORS, config.SPECIALIZED], ids=["descriptors", "specialized"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_forward_for_hopper(d, variant, tmp_path, monkeypatch):
    """TMA loads, and with SPECIALIZED warps that give registers away and others that take them."""
    block_n = 128 if d < 256 else 64
    warps = 4 if variant == config.SPECIALIZED else 8
    monkeypatch.setattr(config, "forward", lambda *shape: config.Config(128, block_n, warps, 2, variant))
    q, k, v = (x.detach() for x in tensors(HALF, d))
    with compiling(90, tmp_path) as found:
        foveate.attention(q, k, v, backend="triton")
        foveate.attention(
            q, k, v, causal=True, window=(100, 0), sinks=torch.zeros(2), return_lse=True, backend="triton"
        )
    assert {kernel.name for kernel in found} == {"attention_forward_hopper"}
    check(found, 90, HALF, d)
    for listing in tmp_path.glob("*/attention_forward_hopper.ptx"):
        code = listing.read_text()
        assert "cp.async.bulk.tensor" in code
        assert ("setmaxnreg" in code) == (variant == config.SPECIALIZED)
