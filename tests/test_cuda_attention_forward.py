"""The CUDA forward kernel where it branches by itself: pages, packed heads, rows at any address, values that no host has checked.

On the emulator's build, and on a GPU under FOVEATE_TEST_DEVICE=cuda. Options, shapes and types: test_attention_forward.py."""

from __future__ import annotations

import pytest
import torch

import compare
import foveate
from cases import AttentionCase, make_inputs
from foveate._backends import runs_cuda_kernels
from kv_cases import BF16, F16, KvCase, KvInputs, exact, in_torch, make_kv_inputs


@pytest.fixture(autouse=True)
def needs_cuda_kernels(device):
    if foveate.backends()["native"] is not None or not runs_cuda_kernels(device):
        pytest.skip("the native backend runs CPU kernels here")


def nan_where_unused(inputs: KvInputs, new: int) -> KvInputs:
    """NaN in pages that no sequence has, and behind the keys of every sequence."""
    inputs = inputs.clone()
    table, lens = inputs.options["block_table"].long(), inputs.options["kv_lens"].tolist()
    for cache in (inputs.k_cache, inputs.v_cache):
        used = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for b, length in enumerate(lens):
            position = torch.arange(length + new)
            used[table[b, position // cache.shape[1]], position % cache.shape[1]] = True
        cache[~used] = float("nan")
    return inputs


def at_odd_addresses(x: torch.Tensor) -> torch.Tensor:
    """The same values, in rows that lie an odd number of elements apart, of NaN between."""
    view = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)[..., 1:-2]
    return view.copy_(x)


PAGED = [
    KvCase(sq=70, b=2, page_size=7, longest=60, dtype=BF16),
    KvCase(sq=66, b=2, page_size=64, longest=90, dtype=F16, window=(40, 0), sinks=True, softcap=9.0),
    KvCase(sq=64, b=1, hq=2, hkv=1, page_size=1, d=40, longest=30, new=False, causal=False),
]


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.id)
def test_many_queries_on_pages(case, seed):
    """From 64 queries on the op leaves attention to this kernel; unused pages and the rest of the last ones hold NaN."""
    inputs = make_kv_inputs(case, seed)
    (expected, lse), (peer, peer_lse) = exact(inputs), in_torch(inputs)
    results = nan_where_unused(inputs, case.new_tokens).run("native")
    compare.assert_as_good_as_torch(results[0], expected, peer)
    compare.assert_as_good_as_torch(results[1], lse, peer_lse, name="lse")


@pytest.mark.parametrize("page", [-1, 10**6, -(2**31), 2**31 - 1])
def test_pages_that_do_not_exist(page, device, seed, monkeypatch):
    if device != "cpu":
        pytest.skip("the emulator says which memory was touched; a GPU may not")
    monkeypatch.setenv("FOVEATE_EMULATOR_READABLE", "0")
    inputs = make_kv_inputs(PAGED[0], seed)
    expected, _ = exact(inputs)
    inputs.options["block_table"][1] = page
    out, _ = inputs.run("native")
    assert out[1].isfinite().all()
    torch.testing.assert_close(out[0].double(), expected[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("ends", [[0, -5, 40], [0, 10**9, 40], [7, 3, 2**31 - 1], [-(2**31), 20, 41]], ids=str)
def test_cu_seqlens_outside_of_the_tensors(ends, device, seed, monkeypatch):
    """The emulator raises at a touch of memory that is not a tensor's of the call; what is inside is only read."""
    if device != "cpu":
        pytest.skip("the emulator says which memory was touched; a GPU may not")
    monkeypatch.setenv("FOVEATE_EMULATOR_READABLE", "0")
    q, k, v = (torch.randn(40, 2, 32, dtype=BF16) for _ in range(3))
    wrong, right = torch.tensor(ends, dtype=torch.int32), torch.tensor([0, 20, 40], dtype=torch.int32)
    before = [x.clone() for x in (q, k, v)]
    for cu_q, cu_k in ((wrong, right), (right, wrong), (wrong, wrong)):
        out = foveate.attention_varlen(q, k, v, cu_q, cu_k, 40, 40, causal=True, backend="native")
        assert out.shape == q.shape and all(map(torch.equal, (q, k, v), before))
        if cu_q is right:  # every row is written, whatever its keys are
            assert out.isfinite().all()


def test_packed_heads_have_the_bits_of_heads_apart(device, seed):
    """Few queries of grouped heads share a tile; with keys and values repeated for every head, none do."""
    for sq, group in ((1, 4), (19, 4), (64, 2), (70, 3)):
        case = AttentionCase(b=2, sq=sq, skv=150, hq=2 * group, hkv=2, d=64, dtype=BF16)
        inputs = make_inputs(case, seed, device)
        options = {"causal": True, "window": (90, -1), "return_lse": True, "backend": "native"}
        repeated = (x.repeat_interleave(group, dim=2) for x in (inputs.k, inputs.v))
        together = foveate.attention(inputs.q, inputs.k, inputs.v, **options)
        apart = foveate.attention(inputs.q, *repeated, **options)
        assert all(map(torch.equal, together, apart)), (sq, group)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16], ids=str)
def test_rows_at_any_address_have_the_same_bits(dtype, device, seed):
    """Rows that do not begin at multiples of 16 bytes are loaded by elements, in another instance of the kernel."""
    for d, dv in ((64, 64), (128, 24), (40, 200)):
        inputs = make_inputs(AttentionCase(b=2, sq=67, skv=70, hkv=2, d=d, dv=dv, dtype=dtype), seed, device)
        aligned = (inputs.q, inputs.k, inputs.v)
        for moved in range(3):
            tensors = [at_odd_addresses(x) if i == moved else x for i, x in enumerate(aligned)]
            assert tensors[moved].stride(-1) == 1 and tensors[moved].data_ptr() % 16 != 0
            a, b = (foveate.attention(*x, causal=True, backend="native") for x in (aligned, tensors))
            assert torch.equal(a, b), (d, dv, moved)
