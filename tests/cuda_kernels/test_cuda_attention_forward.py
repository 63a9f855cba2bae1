"""The CUDA forward kernel where it branches by itself: pages, packed heads, rows at any address, values that no host has checked.

On the emulator's build, and on a GPU under FOVEATE_TEST_DEVICE=cuda. Options, shapes and types: test_attention_forward.py."""

from __future__ import annotations

import pytest
import torch

import compare
import foveate
from cases import AttentionCase, make_inputs
from foveate.backend.native import runs_cuda_kernels
from foveate.ops.attention.plan import other_cuda_thresholds
from kv_cases import BF16, F16, KvCase, KvInputs, exact, forward_floors, in_torch, make_kv_inputs

pytestmark = pytest.mark.emulated


@pytest.fixture(autouse=True)
def needs_cuda_kernels(device):
    if foveate.backends()["native"] is not None or not runs_cuda_kernels(device):
        pytest.skip("the native backend runs CPU kernels here")


def nan_where_unused(inputs: KvInputs, new: int) -> KvInputs:
    """NaN in pages that no sequence has, behind the keys of every sequence, and in pages before its window, which may be another's."""
    inputs = inputs.clone()
    table, lens = inputs.options["block_table"].long(), inputs.options["kv_lens"].tolist()
    Sq, page_size, window = inputs.q.shape[1], inputs.k_cache.shape[1], inputs.options["window"]
    for cache in (inputs.k_cache, inputs.v_cache):
        used = torch.zeros(cache.shape[:2], dtype=torch.bool)
        for b, length in enumerate(lens):
            first = max(0, length + new - Sq - window[0]) if window is not None else 0
            position = torch.arange(first // page_size * page_size, length + new)
            used[table[b, position // page_size], position % page_size] = True
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
    KvCase(sq=65, b=2, page_size=16, d=64, longest=250, dtype=BF16, window=(20, -1), sinks=True),
    KvCase(sq=65, b=2, page_size=3, d=64, longest=250, dtype=F16, window=(20, -1)),
    KvCase(sq=16, b=1, hq=16, hkv=4, page_size=32, d=128, longest=150, dtype=F16),
    KvCase(sq=70, b=1, hq=2, hkv=1, page_size=1, d=72, dv=40, longest=30, dtype=BF16, causal=False, rotary=8),
    KvCase(sq=64, b=1, hq=1, hkv=1, page_size=128, d=192, dv=128, longest=70, dtype=BF16),
    KvCase(sq=64, b=1, hq=1, hkv=1, page_size=64, d=256, longest=30, dtype=BF16),
]


@pytest.mark.parametrize("case", PAGED, ids=lambda case: case.id)
def test_many_queries_on_pages(case, seed):
    """From 64 queries on the op leaves attention to this kernel; unused pages and the rest of the last ones hold NaN."""
    inputs = make_kv_inputs(case, seed)
    (expected, lse), (peer, peer_lse) = exact(inputs), in_torch(inputs)
    results = nan_where_unused(inputs, case.new_tokens).run("native")
    floors = forward_floors(inputs)
    compare.assert_as_good_as_torch(results[0], expected, peer, floor=floors["out"])
    compare.assert_as_good_as_torch(results[1], lse, peer_lse, name="lse", floor=floors["lse"])


@pytest.mark.parametrize("page_size", [16, 7, None])
def test_pages_have_the_bits_of_a_dense_cache(page_size, launched, seed):
    """Pages of a power of two have an instance of their own, others ride in the general one; all use the same steps."""
    case = KvCase(sq=80, b=2, hq=8, hkv=2, d=64, page_size=page_size, longest=100, dtype=BF16, new=False)
    inputs = make_kv_inputs(case, seed)
    dense = inputs.clone()
    if page_size is not None:
        table = inputs.options["block_table"].long()
        dense.k_cache, dense.v_cache = (x[table].flatten(1, 2) for x in (inputs.k_cache, inputs.v_cache))
        dense.options["block_table"] = None
    kinds = {16: "kPaged", 7: "kGeneral", None: "kPlain"}
    assert [kinds[page_size] in name for name in launched(lambda: inputs.run("native"))] == [True]
    assert all(map(torch.equal, inputs.run("native"), dense.run("native")))


@pytest.mark.parametrize("page", [-1, 10**6, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("page_size", [7, 16])
def test_pages_that_do_not_exist(page, page_size, device, seed, monkeypatch):
    if device != "cpu":
        pytest.skip("the emulator says which memory was touched; a GPU may not")
    monkeypatch.setenv("FOVEATE_EMULATOR_READABLE", "0")
    inputs = make_kv_inputs(KvCase(sq=70, b=2, page_size=page_size, longest=60, dtype=BF16), seed)
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


FEW = [
    AttentionCase(b=1, sq=1, skv=700, hq=4, hkv=1, d=64, dtype=BF16, sinks=True),
    AttentionCase(
        b=2, sq=5, skv=300, hq=2, hkv=2, d=40, dv=24, causal=True, window=(100, -1), kv_lens=True, alibi="bh"
    ),
    AttentionCase(b=1, sq=9, skv=300, hq=4, hkv=2, d=128, dtype=F16, causal=True, softcap=3.0, layout="bhsd"),
]


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.id)
def test_few_queries_to_many_keys_take_the_decode_kernel(case, launched, device, seed):
    """Its splits keep SMs busy that the blocked kernel, with a block for each KV head, has no work for."""
    inputs = make_inputs(case, seed, device)
    assert [name.split("<")[0] for name in launched(lambda: inputs.run("native"))] == ["decode_kernel"]
    check = "test_cuda_attention_forward.check"
    compare.assert_case_as_good_as_torch(case, seed, "native", device, check, backward=True)
    with other_cuda_thresholds(blocked_rows=0):
        assert ["forward" in name for name in launched(lambda: inputs.run("native"))] == [True]


@pytest.mark.parametrize(
    "options", [{"bias": "11qk"}, {"mask": "11qk"}, {"dropout": 0.1}, {"relative": "backward"}], ids=str
)
def test_few_queries_with_options_that_decode_lacks(options, launched, device, seed):
    inputs = make_inputs(AttentionCase(b=1, sq=3, skv=300, hq=2, hkv=2, **options), seed, device)
    assert ["forward" in name for name in launched(lambda: inputs.run("native"))] == [True]


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
