"""What the memory accesses of the CUDA kernels cost, as the emulator counts it from their addresses (docs/kernels/emulator.md): no bank
conflicts and no sectors beyond what the bytes need, but for the places listed. In the emulator's build."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import foveate
from foveate.backend.native import _C
from kv_cases import BF16, F8, F16, F32, I8, KvCase, make_kv_inputs

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(_C is None or not _C.cuda_emulated, reason="needs the emulator's build"),
]

# Places that cost more than the least, and how many times it: at most.
# Fragments of mma leave a lane 2 neighbours of 8 columns, half of a sector for the quad.
GRADIENTS = {("atomic_add", "cuda/attention/backward_keys.cu"): 2, ("st_global", "cuda/attention/backward.cuh"): 2}
# A lane holds 8 numbers, 32 bytes in fp32, which it moves 16 at a time.
EIGHT_FP32 = {
    ("ld_global_nc", "cuda/rows/row.cuh"): 2,
    ("ld_global", "cuda/rows/row.cuh"): 2,
    ("st_global", "cuda/rows/row.cuh"): 2,
}
# Of each result once: its columns lie 4 by 4 in the lanes; the log-sum-exps of a row, one for each split.
MERGE = {("st_global", "cuda/kv_cache/decode.cu"): 4, ("ld_global", "cuda/kv_cache/decode.cu"): 3}
# The pages of 16 keys are few numbers, which may lie on both sides of a sector's end.
PAGES = {("ld_global_nc", "cuda/kv_cache/kv_cache.cuh"): 2}
# int8 and fp8: a lane widens 16 numbers to 2 stores of 16 bytes; the scales of a head lie Hkv apart.
WIDENED = {
    **MERGE,
    ("ld_global", "cuda/kv_cache/decode_work.cuh"): 3,
    ("st_shared", "cuda/kv_cache/decode_tile.cuh"): 2,
}


@pytest.fixture
def costly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs f; of each kernel, how many times the least cost each kind of access has, where it is more than 1."""
    if os.environ.get("FOVEATE_EMULATOR_PTX"):
        pytest.skip("the PTX machine does not count what accesses cost")

    def run(f: Callable) -> dict[str, dict[tuple[str, str], float]]:
        path = tmp_path / "counters.jsonl"
        monkeypatch.setenv("FOVEATE_EMULATOR_COUNTERS", str(path))
        f()
        monkeypatch.delenv("FOVEATE_EMULATOR_COUNTERS")
        factors: dict[str, dict[tuple[str, str], float]] = {}
        for line in path.read_text().splitlines():
            launch = json.loads(line)
            places = factors.setdefault(launch["kernel"].split("<")[0], {})
            assert launch["accesses"]
            for access in launch["accesses"]:
                place = access["operation"], access["at"].split(":")[0]
                if access["cost"] > access["least"]:
                    places[place] = max(places.get(place, 1), access["cost"] / access["least"])
        path.unlink()
        return factors

    return run


def assert_least(factors: dict[tuple[str, str], float], listed: dict[tuple[str, str], float]) -> None:
    assert {place: factor for place, factor in factors.items() if factor > listed.get(place, 1)} == {}


def attend(d: int, dtype: torch.dtype, **options):
    q, k, v = (torch.randn(1, 192, 2, d, dtype=dtype, requires_grad=True) for _ in range(3))
    out = foveate.attention(q, k, v, causal=True, backend="native", **options)
    out.backward(torch.randn_like(out))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("d", [64, 128])
def test_attention_has_no_bank_conflicts(costly, d: int, dtype: torch.dtype) -> None:
    factors = costly(lambda: attend(d, dtype))
    assert set(factors) == {"attention_forward_kernel", "row_statistics", "key_gradients", "round_query_gradient"}
    assert_least(factors.pop("key_gradients"), GRADIENTS)
    for kernel, places in factors.items():
        assert places == {}, kernel


@pytest.mark.parametrize("d", [32, 80, 96, 256])
def test_attention_of_other_head_dims(costly, d: int) -> None:
    factors = costly(lambda: attend(d, BF16))
    assert_least(factors.pop("key_gradients"), GRADIENTS)
    for kernel, places in factors.items():
        assert places == {}, kernel


@pytest.mark.parametrize("d, hq", [(64, 4), (128, 4), (128, 16)])
@pytest.mark.parametrize("page_size, num_splits", [(None, 1), (16, 1), (None, 3)])
def test_decode_has_no_bank_conflicts(costly, d: int, hq: int, page_size: int | None, num_splits: int) -> None:
    inputs = make_kv_inputs(KvCase(dtype=BF16, d=d, hq=hq, longest=300, page_size=page_size, num_splits=num_splits))
    factors = costly(lambda: inputs.run("native"))
    pages = PAGES if page_size else {}
    assert_least(factors.pop("kv_append_kernel"), pages)
    assert set(factors) == {"decode_kernel"}
    assert_least(factors["decode_kernel"], (MERGE if num_splits > 1 else {}) | pages)


@pytest.mark.parametrize("storage", [I8, F8])
def test_decode_of_a_quantised_cache(costly, storage: torch.dtype) -> None:
    inputs = make_kv_inputs(KvCase(dtype=BF16, storage=storage, d=128, longest=300))
    factors = costly(lambda: inputs.run("native"))
    assert factors["kv_append_kernel"] == {}
    assert_least(factors["decode_kernel"], WIDENED)


@pytest.mark.parametrize("rotary", [None, 32])
def test_append(costly, rotary: int | None) -> None:
    inputs = make_kv_inputs(KvCase(dtype=BF16, d=64, sq=32, longest=64, rotary=rotary, page_size=16))
    assert_least(costly(lambda: inputs.run("native"))["kv_append_kernel"], EIGHT_FP32 if rotary else {})


def test_page_copies(costly) -> None:
    pool = torch.randn(2, 8, 16, 2, 64).to(BF16)
    assert costly(lambda: _C.copy_pages(pool, [0, 3], [4, 5])) == {"copy_pages_kernel": {}}


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("shape", [(64, 256), (6, 4096), (3, 16384)])
def test_rows(costly, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, target = torch.randn(shape).to(dtype), torch.randint(0, shape[1], shape[:1])
    weight = torch.randn(shape[1]).to(dtype).requires_grad_()

    def run(f: Callable) -> dict[str, dict[tuple[str, str], float]]:
        leaf = x.clone().requires_grad_()
        return costly(lambda: f(leaf).float().sum().backward())

    results = run(lambda leaf: foveate.softmax(leaf, backend="native"))
    results |= run(lambda leaf: foveate.cross_entropy(leaf, target, reduction="none", backend="native"))
    results |= run(lambda leaf: foveate.rms_norm(leaf, weight, 1e-5, backend="native"))
    assert len(results) == 6
    assert_least(
        results.pop("rms_norm_backward_kernel"), EIGHT_FP32 if dtype != F32 else {}
    )  # the parts of dweight are fp32
    for kernel, places in results.items():
        assert places == {}, kernel


def test_rotary(costly) -> None:
    q, k = torch.randn(1, 64, 4, 64).to(BF16), torch.randn(1, 64, 2, 64).to(BF16)
    table = torch.rand(64, 32)
    assert_least(
        costly(lambda: foveate.apply_rotary(q, k, table, table, backend="native"))["rotary_kernel"], EIGHT_FP32
    )
