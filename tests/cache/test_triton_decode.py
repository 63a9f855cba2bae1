"""attention_with_kv_cache on the Triton kernels. On the CPU they run under the interpreter: TRITON_INTERPRET=1 at Python's start."""

from __future__ import annotations

import pytest
import test_kv_cache as kv
import torch

import foveate
from kv_cases import BF16, F8, F16, F32, I8, KvCase, KvInputs, bits, make_kv_inputs

if foveate.backends()["triton"] is not None:
    pytest.skip(f"triton: {foveate.backends()['triton']}", allow_module_level=True)

from foveate.backend.triton import copy_pages as copy_pages_module
from foveate.backend.triton.copy_pages import copy_pages
from foveate.backend.triton.decode_launch import decode_plan

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]


@pytest.fixture(autouse=True)
def _on_the_device(device):
    """Every tensor that a test makes is on the device under test."""
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


CASES = (
    [KvCase(**option) for option in kv.OPTIONS]
    + [KvCase(**layout, **option) for layout in kv.LAYOUTS[1:] for option in (kv.OPTIONS[0], kv.OPTIONS[-1])]
    + [
        KvCase(d=192, dv=128, hq=4, hkv=4, page_size=64, dtype=BF16),
        KvCase(d=576, dv=512, hq=20, hkv=1, page_size=64, dtype=BF16, longest=50),
        KvCase(longest=1000, b=1, dtype=BF16),
        KvCase(b=0),
        KvCase(sq=0, snew=3),
    ]
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_against_exact(case, seed):
    kv.check_case(case, seed, "triton")


@pytest.mark.parametrize("layout", kv.LAYOUTS, ids=lambda layout: KvCase(**layout).id)
def test_append_writes_what_the_reference_writes_and_nothing_else(layout, seed):
    kv.check_append(layout, seed, "triton")


@pytest.mark.parametrize("storage", [I8, F8], ids=str)
def test_every_stored_value_and_halfway_point(storage, monkeypatch):
    monkeypatch.setattr(kv, "BACKENDS", ("triton", "reference"))
    kv.test_every_stored_value_and_halfway_point(storage)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotated_keys_are_appended(dtype, interleaved, seed):
    case = KvCase(dtype=dtype, b=3, sq=9, rotary=11, interleaved=interleaved, rotary_dtype=dtype)
    inputs = make_kv_inputs(case, seed)
    ours, reference = inputs.clone(), inputs.clone()
    ours.run("triton"), reference.run("reference")
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.k_cache, reference.k_cache, rtol=2 * ulp, atol=2 * ulp)
    assert torch.equal(bits(ours.v_cache), bits(reference.v_cache))


@pytest.fixture
def everything_on_triton(monkeypatch):
    """For tests of other files that name the native backend."""
    run = KvInputs.run
    monkeypatch.setattr(KvInputs, "run", lambda self, backend=None: run(self, "triton"))


@pytest.mark.parametrize("case", kv.POISONED, ids=lambda case: case.id)
def test_nothing_beyond_the_length_is_read(case, seed, everything_on_triton):
    kv.test_nothing_beyond_the_length_is_read(case, seed)


def test_paged_equals_dense_bitwise_and_views(seed, everything_on_triton):
    kv.test_paged_equals_dense_bitwise(seed)
    kv.test_arguments_as_views(seed)


def test_pages_before_the_window_may_be_gone(seed):
    inputs = make_kv_inputs(KvCase(page_size=8, window=(10, -1), longest=60), seed)
    clean, gone = inputs.clone(), inputs.clone()
    for b, n in enumerate(gone.options["kv_lens"].tolist()):
        gone.options["block_table"][b, : max(n - 10, 0) // 8] = -(2**30)
    assert torch.equal(clean.run("triton")[0], gone.run("triton")[0])


def test_batch_invariant(seed):
    """A sequence's result has the same bits alone and in a batch."""
    inputs = make_kv_inputs(KvCase(b=3, batch_invariant=True, longest=70, new=False, hq=8), seed)
    together = inputs.run("triton")[0]
    for b in range(3):
        options = inputs.options | {"kv_lens": inputs.options["kv_lens"][b : b + 1]}
        alone = foveate.attention_with_kv_cache(
            inputs.q[b : b + 1], inputs.k_cache[b : b + 1], inputs.v_cache[b : b + 1], **options, backend="triton"
        )
        assert torch.equal(alone[0], together[b])


def test_plan():
    """Many sequences need no splits, few and long ones as many as fill the chip, short ones none; rows and head dims size the tiles."""

    def plan(B=1, rows=4, Hkv=8, D=128, Dv=128, max_keys=8192, num_sms=132, num_splits=0, batch_invariant=False):
        return decode_plan(B, rows, Hkv, D, Dv, max_keys, num_sms, num_splits, batch_invariant)

    assert plan(B=64).num_splits == 1
    assert plan().num_splits == 32  # 8 programs, 33 wanted for each, 32 parts of 256 keys
    assert plan(max_keys=200).num_splits == 1
    assert plan(num_splits=5) == plan(num_splits=5, B=64) and plan(num_splits=5).num_splits == 5
    invariant = plan(batch_invariant=True)
    assert invariant == plan(batch_invariant=True, B=64) and (invariant.num_splits, invariant.keys_per_split) == (
        4,
        2048,
    )
    assert plan(rows=40).block_m == 64 and plan(rows=40, D=256).block_m == 16


@pytest.mark.parametrize("shape", [(2, 9, 16, 2, 64), (3, 9, 3, 1, 5), (2, 9, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, I8, F8], ids=str)
def test_pages_are_copied_in_every_layer_and_no_others(dtype, shape):
    pool = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize)).to(torch.uint8).view(dtype)
    expected = pool.clone()
    for old, new in ((1, 4), (1, 8), (7, 0)):
        expected[:, new] = expected[:, old]
    copy_pages(pool, [1, 1, 7], [4, 8, 0])
    assert torch.equal(bits(pool), bits(expected))


@pytest.mark.parametrize("dtype", [F32, I8], ids=str)
def test_a_forked_cache_copies_its_last_page_by_the_kernel(dtype, device, monkeypatch):
    copied = []
    monkeypatch.setattr(copy_pages_module, "copy_pages", lambda *args: (copied.append(args[1:]), copy_pages(*args)))
    cache = foveate.PagedKVCache(9, 4, num_kv_heads=2, head_dim=16, num_layers=2, dtype=dtype, device=device)
    seqs = [cache.create()]
    cache.append(seqs, 6)
    k, v = torch.randn(1, 6, 2, 16), torch.randn(1, 6, 2, 16)
    for layer in range(2):
        cache.attend(layer, k, k, v, seqs=seqs, backend="triton")
    seqs += [cache.fork(seqs[0]) for _ in range(2)]
    cache.append(seqs)
    assert copied == [([1, 1], [2, 3])] * (2 if dtype == F32 else 4)
    for pool in (cache.k_pages, cache.v_pages, *([] if dtype == F32 else [cache.k_scale, cache.v_scale])):
        rows = [pool[:, cache.pages(seq)[1], :2] for seq in seqs]
        assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    assert len({cache.pages(seq)[1] for seq in seqs}) == 3
