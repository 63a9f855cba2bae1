"""The division of decode work: the plan, splits, threads, batch invariance."""

from __future__ import annotations

import contextlib

import pytest
import torch

import compare
import foveate
from foveate.ops.attention.operands import Operands
from foveate.ops.attention.plan import (
    CudaThresholds,
    DecodePlan,
    attention_plan,
    cuda_decode_plan,
    cuda_few_queries,
    cuda_thresholds,
    decode_plan,
    other_cuda_thresholds,
    step_plan,
)
from kv_cases import BF16, F8, F32, KvCase, KvInputs, exact, forward_floors, in_torch, make_kv_inputs

pytestmark = [pytest.mark.kernels, pytest.mark.cuda]


@contextlib.contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plan(
    B=1, Sq=1, Hq=32, Hkv=8, D=128, Dv=128, keys=8192, threads=2, num_splits=0, batch_invariant=False, quantized=False
) -> DecodePlan:
    return decode_plan(B, Sq, Hq, Hkv, D, Dv, keys, threads, num_splits, batch_invariant, quantized)


def test_plan_splits_only_where_the_threads_need_it():
    assert plan(threads=1).num_splits == 1
    assert plan().num_splits > 1
    assert plan(B=64).num_splits == 1
    assert plan(threads=64).num_splits > plan(threads=4).num_splits
    assert plan(keys=256).num_splits == 1  # too short to be divided
    assert plan(num_splits=5).num_splits == 5


def call_plan(B=1, Sq=1, Hq=32, Hkv=8, D=128, Dv=128, keys=8192, threads=2, plain=True):
    return attention_plan(B, Sq, Hq, Hkv, D, Dv, keys, threads, plain)


def test_attention_takes_the_decode_kernel_for_few_plain_rows():
    assert not call_plan()[0].blocked and not call_plan(Sq=4)[0].blocked
    assert call_plan(Sq=5)[0].blocked  # 20 rows share a KV head
    assert call_plan(plain=False)[0].blocked
    for empty in ({"B": 0}, {"Hq": 0, "Hkv": 0}, {"Sq": 0}):
        assert call_plan(**empty)[0].blocked


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize(
    "shape", [{}, {"B": 8}, {"keys": 300}, {"Hq": 9, "Hkv": 3, "D": 64}, {"Sq": 4, "B": 3, "keys": 700}]
)
def test_attention_is_divided_as_decoding_from_a_cache(shape, threads):
    assert call_plan(**shape, threads=threads) == (plan(**shape, threads=threads), threads)


def test_keys_are_split_and_then_heads():
    assert plan(threads=1) == DecodePlan(1, 0, 4, 8, False)
    assert plan(threads=2) == DecodePlan(8, 0, 4, 8, False)
    assert plan(threads=2, keys=256) == DecodePlan(
        1, 0, 4, 4, False
    )  # too few to be split: heads, a task for each thread
    assert plan(threads=16, keys=300) == DecodePlan(2, 0, 4, 1, False)
    assert (
        plan(threads=2, keys=256, B=2).heads_per_task == 2
    )  # two sequences may differ in length: four tasks for each thread


def test_attention_of_little_work_stays_on_one_thread():
    assert call_plan(keys=4, threads=16)[1] == 1
    assert call_plan(threads=16)[1] == 16


@pytest.mark.skipif(foveate.backend.native.missing_reason is not None, reason="no compiled module")
@pytest.mark.parametrize("options", [{"cu_q": True}, {"dropout_p": 0.5}, {"dtype": torch.float64}])
def test_the_decode_kernel_refuses_what_it_does_not_know(options):
    if foveate.backend.native.runs_cuda_kernels("cpu"):
        pytest.skip("the CUDA kernels do not read the plan")
    q, k, v = torch.randn(3, 1, 2, 1, 8, dtype=options.pop("dtype", torch.float32)).unbind()
    if options.pop("cu_q", False):
        q, k, v, lengths = q[0], k[0], v[0], torch.tensor([0, 2])
        options |= {"cu_q": lengths, "cu_k": lengths}
    operands = Operands(q, k, v, max_q=2, max_k=2, philox=torch.tensor([1, 2]), **options)
    with pytest.raises(ValueError, match="the plan asks for the decode kernel, which takes no cu_seqlens"):
        foveate.backend.native._C.attention_forward(
            operands, None, torch.empty_like(q), None, DecodePlan(1, 0, 2, 1, False), 1
        )


def test_a_step_of_a_model_attends_to_a_prompt_with_the_blocked_kernel():
    assert step_plan(2, 32, 32, 8, 128, 4096, 2, False).blocked
    assert not step_plan(2, 31, 32, 8, 128, 4096, 2, False).blocked  # drafts: rows as in steps of one token
    assert not step_plan(2, 32, 32, 8, 128, 4096, 2, True).blocked
    assert not step_plan(2, 32, 32, 8, 640, 4096, 2, False).blocked
    assert step_plan(2, 4, 32, 8, 128, 4096, 2, False)[:2] == (2, 2048)  # the splits of a batch-invariant call


def test_plan_keeps_all_heads_of_a_key_together_while_their_state_fits():
    assert plan() == plan()._replace(rows_per_task=4, heads_per_task=8)
    assert plan(Hq=64, Hkv=64).heads_per_task == 64
    assert plan(Hq=64, Hkv=64, Sq=64).heads_per_task < 64
    assert plan(Hq=128, Hkv=1, D=576, Dv=512).rows_per_task == 64


def test_plan_with_batch_invariance_splits_by_the_cache_alone():
    splits = {plan(B=b, threads=t, batch_invariant=True)[:2] for b in (1, 3, 32) for t in (1, 2, 16)}
    assert splits == {(4, 2048)}
    assert plan(batch_invariant=True, threads=16).heads_per_task < plan(batch_invariant=True, threads=1).heads_per_task


def test_plan_gives_many_queries_to_the_blocked_kernel():
    assert plan(Sq=16).blocked and not plan(Sq=4).blocked and not plan(Hq=64, Hkv=1).blocked
    assert not plan(Sq=16, batch_invariant=True).blocked and not plan(Sq=16, num_splits=2).blocked
    assert (
        not plan(Sq=16, quantized=True).blocked
        and plan(Sq=16, D=576, Dv=512).blocked
        and not plan(Sq=16, D=584).blocked
    )


def cuda_plan(
    B=1,
    Sq=1,
    Hq=32,
    Hkv=8,
    D=128,
    Dv=128,
    keys=8192,
    num_sms=132,
    num_splits=0,
    batch_invariant=False,
    quantized=False,
) -> DecodePlan:
    return cuda_decode_plan(B, Sq, Hq, Hkv, D, Dv, keys, num_sms, num_splits, batch_invariant, quantized)


@pytest.mark.emulated
def test_cuda_plan_fills_the_gpu_once():
    for b in (1, 3, 16, 33, 64):
        blocks = b * 8 * cuda_plan(B=b).num_splits
        assert blocks <= 2 * 132 or cuda_plan(B=b).num_splits == 1
    assert cuda_plan().num_splits == 33
    assert cuda_plan(B=64).num_splits == 1
    assert cuda_plan(keys=1024).num_splits == 8  # a split has 128 keys
    assert cuda_plan(keys=0).num_splits == cuda_plan(keys=128).num_splits == 1
    assert cuda_plan(num_splits=5).num_splits == 5
    assert cuda_plan(Hq=128, Hkv=1, D=576, Dv=512).num_splits == 2 * 132 // (
        8 * 2
    )  # 8 tiles of rows, 2 slices of columns


@pytest.mark.emulated
def test_cuda_plan_with_batch_invariance_splits_by_the_cache_alone():
    assert {cuda_plan(B=b, num_sms=n, batch_invariant=True)[:2] for b in (1, 3, 32) for n in (1, 108, 132)} == {
        (4, 2048)
    }
    assert not cuda_plan(Sq=512, batch_invariant=True).blocked


@pytest.mark.emulated
def test_cuda_plan_gives_many_queries_to_the_blocked_kernel():
    assert cuda_plan(Sq=64).blocked and not cuda_plan(Sq=8).blocked
    assert cuda_plan(Sq=16, B=8).blocked and not cuda_plan(Sq=16).blocked  # too few heads to fill the GPU
    assert not cuda_plan(Sq=64, quantized=True).blocked and not cuda_plan(Sq=64, num_splits=2).blocked
    assert not cuda_plan(Sq=64, D=576, Dv=512).blocked and not cuda_plan(Hq=128, Hkv=1, B=8).blocked


@pytest.mark.emulated
def test_cuda_thresholds_move_the_choice():
    shape = (1, 16, 32, 8, 128, 128, 8192, 132, 0, False, False)
    limits = CudaThresholds()
    assert cuda_decode_plan(*shape) == cuda_decode_plan(*shape, limits) and not cuda_decode_plan(*shape).blocked
    assert cuda_decode_plan(*shape, limits._replace(blocked_queries=16)).blocked
    one_query = (1, 1, *shape[2:])
    assert cuda_decode_plan(*one_query, limits._replace(blocked_queries=1)).blocked
    assert not cuda_decode_plan(8, 512, *shape[2:], limits._replace(blocked_queries=2**31, blocked_rows=2**31)).blocked
    assert cuda_decode_plan(*one_query, limits._replace(min_split_keys=1024)).num_splits == 8
    assert cuda_decode_plan(*one_query, limits._replace(blocks_per_sm=1)).num_splits == 16
    assert cuda_decode_plan(*one_query, limits._replace(max_splits=7)).num_splits == 7


@pytest.mark.emulated
def test_cuda_attention_of_few_queries_goes_to_decode_where_splits_help():
    def few(B=1, Sq=1, Hq=32, Hkv=8, Skv=8192, num_sms=132):
        return cuda_few_queries(B, Sq, Hq, Hkv, Skv, num_sms)

    assert few() and few(Sq=8) and few(B=16) and few(Skv=256)
    assert not few(Sq=16) and not few(Hq=128, Hkv=1)  # rows enough for a tile of the blocked kernel
    assert not few(B=17) and few(B=13, num_sms=108) and not few(B=14, num_sms=108)  # blocks enough
    assert not few(Skv=255)  # too short to be divided
    assert not few(B=0) and not few(Sq=0)


def test_other_cuda_thresholds_are_in_force_for_a_while():
    with other_cuda_thresholds(blocked_queries=1, max_splits=3) as limits:
        assert limits == cuda_thresholds() == CudaThresholds(blocked_queries=1, max_splits=3)
        with pytest.raises(ValueError, match="blocked_key"), other_cuda_thresholds(blocked_keys=1):
            pass
    assert cuda_thresholds() == CudaThresholds()


SHAPES = [
    KvCase(longest=900, hq=8, sq=2),
    KvCase(longest=700, dtype=BF16, page_size=16, d=64),
    KvCase(longest=500, storage=F8, window=(300, -1), sinks=True),
    KvCase(longest=400, sq=30, softcap=4.0),
]


@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.id)
@pytest.mark.parametrize("splits", [2, 7, 64])
def test_split_equals_unsplit(case, splits, seed):
    inputs = make_kv_inputs(case, seed)
    results = []
    for num_splits in (1, splits):
        run = inputs.clone()
        run.options["num_splits"] = num_splits
        results.append(run.run("native"))
    (one, one_lse), (many, many_lse) = results
    # The probabilities are rounded to bf16 relative to another maximum, so in bf16 the two differ by that rounding.
    peer = one if case.dtype == F32 else in_torch(inputs)[0]
    compare.assert_as_good_as_torch(many, exact(inputs)[0], peer, floor=forward_floors(inputs)["out"])
    torch.testing.assert_close(many_lse, one_lse, rtol=1e-5, atol=1e-5)


def test_split_takes_the_split_path(seed):
    """In fp32 another order of summation shows."""
    inputs = make_kv_inputs(KvCase(longest=900, hq=8, b=4, d=64), seed)
    one, many = inputs.clone(), inputs.clone()
    one.options["num_splits"], many.options["num_splits"] = 1, 9
    assert not torch.equal(one.run("native")[0], many.run("native")[0])


def only(inputs: KvInputs, b: int) -> KvInputs:
    """Row b by itself."""
    alone, paged = inputs.clone(), inputs.options["block_table"] is not None
    alone.q = alone.q[b : b + 1]
    for name in ("k", "v", "kv_lens", "block_table"):
        if alone.options.get(name) is not None:
            alone.options[name] = alone.options[name][b : b + 1]
    if not paged:
        alone.k_cache, alone.v_cache = alone.k_cache[b : b + 1], alone.v_cache[b : b + 1]
    return alone


@pytest.mark.parametrize("layout", [{}, {"page_size": 64, "dtype": BF16}], ids=str)
@pytest.mark.parametrize("sq", [1, 40])
def test_batch_invariant_rows_have_the_same_bits_in_every_batch(layout, sq, seed):
    case = KvCase(b=3, hq=16, hkv=8, longest=4500, sq=sq, batch_invariant=True, rotary=8, **layout)
    inputs = make_kv_inputs(case, seed)
    out, lse = inputs.clone().run("native")
    for n in (1, 2, 5):
        with threads(n):
            again, again_lse = inputs.clone().run("native")
            assert torch.equal(again, out) and torch.equal(again_lse, lse)
            for b in range(3):
                alone, alone_lse = only(inputs, b).run("native")
                assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])


def test_order_of_the_batch_is_neutral(seed):
    inputs = make_kv_inputs(KvCase(b=4, longest=300), seed)
    out, _ = inputs.clone().run("native")
    order = [2, 0, 3, 1]
    moved = inputs.clone()
    moved.q, moved.k_cache, moved.v_cache = (x[order].contiguous() for x in (moved.q, moved.k_cache, moved.v_cache))
    for name in ("k", "v", "kv_lens"):
        moved.options[name] = moved.options[name][order].contiguous()
    assert torch.equal(moved.run("native")[0], out[order])


@pytest.mark.parametrize("n", [1, 3, 8])
def test_any_number_of_threads(n, seed):
    inputs = make_kv_inputs(KvCase(b=3, longest=600, hq=8), seed)
    expected, _ = inputs.clone().run("reference")
    with threads(n):
        torch.testing.assert_close(inputs.run("native")[0], expected, rtol=1e-5, atol=2e-6)


def test_a_few_hot_keys_do_not_overflow(seed):
    """Scores of +-1e4 across tiles and splits: the running maximum has to be handed on."""
    q = torch.full((1, 1, 2, 16), 100.0)
    k = torch.zeros(1, 700, 1, 16)
    k[0, 5], k[0, 350], k[0, 699] = 6.0, 6.25, -6.25
    v = torch.randn(1, 700, 1, 16)
    for num_splits in (1, 3):
        out = foveate.attention_with_kv_cache(
            q, k, v, kv_lens=torch.tensor([700]), num_splits=num_splits, backend="native"
        )
        torch.testing.assert_close(out, v[:, 350:351].expand(1, 1, 2, 16), rtol=0, atol=1e-6)


def test_negative_infinity_in_some_scores(seed):
    q, k, v = torch.ones(1, 1, 1, 8), torch.zeros(1, 100, 1, 8), torch.randn(1, 100, 1, 8)
    k[0, :70] = float("-inf")
    out = foveate.attention_with_kv_cache(q, k, v, kv_lens=torch.tensor([100]), backend="native")
    torch.testing.assert_close(out[0, 0, 0], v[0, 70:, 0].mean(0))
