"""Values that no host has checked: on a GPU nobody reads kv_lens, block tables and targets, so the kernels must stay inside the tensors
whatever they are. In the emulator's build, where the device layer checks every access."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.backend.native import _C
from kv_cases import BF16, F8, KvCase, bits, exact, make_kv_inputs

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(_C is None or not _C.cuda_emulated, reason="needs the emulator's build"),
]


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    monkeypatch.setenv("FOVEATE_EMULATOR_READABLE", "0")


CASES = [KvCase(rotary=8, d=24), KvCase(page_size=16, dtype=BF16), KvCase(page_size=4, storage=F8, sq=3)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("length", [-1, -(2**31), 93, 10**6, 2**31 - 1])
def test_lengths_outside_of_the_cache(case, length, seed):
    inputs = make_kv_inputs(case, seed)
    expected, _ = exact(inputs)
    inputs.options["kv_lens"][1] = length
    before = inputs.clone()
    out, _ = inputs.run("native")
    assert out[1].isfinite().all()
    torch.testing.assert_close(out[0].double(), expected[0], rtol=2e-2, atol=2e-2)
    if length < -case.new_tokens or length > 93:  # nothing fits
        table = inputs.options["block_table"]
        own = slice(1, 2) if table is None else table[1].long()
        assert torch.equal(bits(inputs.k_cache[own]), bits(before.k_cache[own]))
        assert torch.equal(bits(inputs.v_cache[own]), bits(before.v_cache[own]))


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.id)
@pytest.mark.parametrize("page", [-1, -(2**31), 10**6, 2**31 - 1])
def test_pages_that_do_not_exist(case, page, seed):
    inputs = make_kv_inputs(case, seed)
    expected, _ = exact(inputs)
    inputs.options["block_table"][1] = page
    before = inputs.clone()
    out, _ = inputs.run("native")
    assert out[1].isfinite().all()
    torch.testing.assert_close(out[0].double(), expected[0], rtol=2e-2, atol=2e-2)
    written = inputs.options["block_table"][0].long()
    rest = [i for i in range(len(inputs.k_cache)) if i not in written.tolist()]
    assert torch.equal(bits(inputs.k_cache[rest]), bits(before.k_cache[rest]))


@pytest.mark.parametrize("target", [-1, 65, -(2**63), 2**63 - 1])
def test_targets_that_are_no_class(target):
    logits, targets = torch.randn(5, 65, requires_grad=True), torch.randint(0, 65, (5,))
    expected = foveate.cross_entropy(logits, targets, reduction="none", backend="reference").detach()
    targets[2] = target
    loss = foveate.cross_entropy(logits, targets, reduction="none", backend="native")
    loss.sum().backward()
    good = torch.arange(5) != 2
    assert loss[2].isnan() and logits.grad[2].isnan().all() and logits.grad[good].isfinite().all()
    torch.testing.assert_close(loss[good], expected[good])


def test_counters_are_zero_again(monkeypatch, seed):
    """The counters of a call can be those of the next."""
    from foveate.ops.attention import with_kv_cache_op as kv_cache_op

    kept = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(kv_cache_op, "counters", lambda device, n: kept)
    inputs = make_kv_inputs(KvCase(longest=300, hq=8, sq=3, num_splits=3), seed)
    results = []
    for _ in range(2):
        results.append(inputs.clone().run("native")[0])
        assert kept.eq(0).all()
    assert torch.equal(*results)
    kept[:4] = 1  # the last but one believes that it is the last
    with pytest.raises(RuntimeError, match="race on byte .* in global memory: st.global.* and read by block"):
        inputs.clone().run("native")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3, 9, 4, 2, 8), BF16), ((2, 90, 3), torch.int8), ((2, 90, 12), torch.int8), ((1, 9, 5, 1, 1000), torch.float32)],
    ids=str,
)
def test_copies_of_pages(shape, dtype):
    pool = (torch.randn(shape) * 50).to(dtype)
    expected, pages = pool.clone(), shape[1]
    old, new = [1, 1, 7], [4, 8, 0]
    if pages > 64:  # more than one launch takes
        old, new = [page % 10 for page in range(80)], list(range(10, 90))
    expected[:, new] = expected[:, old]
    _C.copy_pages(pool, old, new)
    assert torch.equal(pool, expected)
    with pytest.raises(ValueError, match="page 4 would be read and written"):
        _C.copy_pages(pool, [1, 4], [4, 5])
    with pytest.raises(ValueError, match="page -1 is outside 0"):
        _C.copy_pages(pool, [-1], [4])
