"""foveate.ring_attention in 2 to 4 gloo processes against attention in one: outputs, gradients, layouts, errors, repeatability."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist

import compare
import foveate
from cases import AttentionCase, make_inputs
from foveate.ring import layout as ring_layout
from ranks import needs_gloo, run_ranks

pytestmark = needs_gloo
_C = AttentionCase

# Lengths are multiples of 2 * 2, 2 * 3 and 2 * 4; chunks of 3 to 12 tokens, shorter and longer than the windows.
CASES = [
    _C(sq=24, skv=24),
    _C(sq=48, skv=48, causal=True),
    _C(sq=48, skv=48, hkv=2, causal=True, dtype=torch.bfloat16),
    _C(sq=24, skv=72, hkv=1, d=24, dv=40, causal=True),
    _C(sq=72, skv=24, hkv=2, causal=True, sinks=True),
    _C(sq=48, skv=48, causal=True, window=(7, -1)),
    _C(sq=48, skv=96, hkv=2, window=(20, 3), softcap=2.0),
    _C(sq=72, skv=72, window=(0, 0), scale=0.3),
    _C(sq=48, skv=24, window=(-1, 5), dtype=torch.float16),
    _C(b=1, sq=24, skv=24, window=(3, 30), sinks=True, layout="bhsd", dtype=torch.bfloat16),
    _C(b=1, sq=24, skv=24, hkv=2, causal=True, dtype=torch.float64),
]


def ring_options(case: AttentionCase, sinks: torch.Tensor | None) -> dict:
    names = ("causal", "window", "scale", "softcap")
    return {name: getattr(case, name) for name in names} | {"sinks": sinks}


def whole_results(case: AttentionCase, seed: int, layout: str, backend: str | None) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of the whole sequence, from this rank's part and those of the others."""
    inputs = make_inputs(case, seed).requires_grad()
    dout, dlse = compare.upstream(inputs, seed)
    q, k, v, dout = (
        ring_layout.split_sequence(x, layout=layout).detach() for x in (inputs.q, inputs.k, inputs.v, dout)
    )
    dlse = ring_layout.split_sequence(dlse, dim=2, layout=layout)
    leaves = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_()}
    options = ring_options(case, inputs.sinks)
    out, lse = foveate.ring_attention(q, k, v, layout=layout, return_lse=True, backend=backend, **options)
    if inputs.sinks is not None:
        leaves["sinks"] = inputs.sinks
    grads = dict(zip(leaves, torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse.to(lse.dtype)))))
    found = {
        "out": ring_layout.gather_sequence(out, layout=layout),
        "lse": ring_layout.gather_sequence(lse, dim=2, layout=layout),
    }
    for name, grad in grads.items():
        if name == "sinks":
            grad = grad.float()  # a sum in bf16 would be the test's error
            dist.all_reduce(grad)
            found["dsinks"] = grad.to(inputs.sinks.dtype)
        else:
            found[f"d{name}"] = ring_layout.gather_sequence(grad, layout=layout)
    return found


def rank_results(rank: int, seed: int) -> list[dict[str, torch.Tensor]]:
    found = [whole_results(case, seed, layout, None) for case in CASES for layout in ring_layout.LAYOUTS]
    found += [whole_results(case, seed, "zigzag", "reference") for case in CASES if case.dtype is not torch.float64]
    return found if rank == 0 else []


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_equals_one_device(size, seed, tmp_path):
    found = iter(run_ranks(rank_results, size, tmp_path, seed)[0])
    wanted = [(case, layout, None) for case in CASES for layout in ring_layout.LAYOUTS]
    wanted += [(case, "zigzag", "reference") for case in CASES if case.dtype is not torch.float64]
    for case, layout, backend in wanted:
        exact, errors = compare.expected(case, seed, "cpu", True)
        ours = next(found)
        assert ours.keys() == exact.keys()
        for name, value in ours.items():
            factor = compare.GRADIENT_FACTOR if name.startswith("d") else compare.FORWARD_FACTOR
            compare.assert_within(value, exact[name], factor, errors[name], f"{case} {layout} {backend} {name}")
            assert name == "lse" or value.dtype == case.dtype
    assert next(found, None) is None


# Of 48 tokens: of length 0 and 1, within a chunk, over one border, over all of them.
PACKED = [[0, 48], [0, 5, 5, 6, 20, 41, 48], [0, 47, 48], [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 48], [0, 0, 48, 48]]
PACKED_OPTIONS = [
    {"causal": True},
    {"window": (4, 2)},
    {"causal": True, "window": (7, -1), "softcap": 3.0, "sinks": True},
    {},
]


def packed_inputs(seed: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(seed)
    q, k, v, dout = (torch.randn(1, 48, heads, 16, dtype=torch.float64) for heads in (4, 2, 2, 4))
    return [q, k, v, dout], torch.randn(4, dtype=torch.float64)


def rank_packed(rank: int, seed: int) -> list[torch.Tensor]:
    tensors, sinks = packed_inputs(seed)
    found = []
    for options in PACKED_OPTIONS:
        options = options | ({"sinks": sinks} if "sinks" in options else {})
        for ends in PACKED:
            for layout in ring_layout.LAYOUTS:
                q, k, v, dout = (ring_layout.split_sequence(x, layout=layout) for x in tensors)
                leaves = [x.requires_grad_() for x in (q, k, v)]
                given = torch.tensor(ends, dtype=torch.int32) if layout == "zigzag" else ends
                out = foveate.ring_attention(*leaves, cu_seqlens=given, layout=layout, **options)
                grads = torch.autograd.grad(out, leaves, dout)
                found += [ring_layout.gather_sequence(x.detach(), layout=layout) for x in (out, *grads)]
    return found if rank == 0 else []


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_packed_sequences_see_nothing_of_each_other(size, seed, tmp_path):
    """attention_varlen on one device, and its gradients, in fp64."""
    found = iter(run_ranks(rank_packed, size, tmp_path, seed)[0])
    tensors, sinks = packed_inputs(seed)
    for options in PACKED_OPTIONS:
        options = options | ({"sinks": sinks} if "sinks" in options else {})
        for ends in PACKED:
            cu = torch.tensor(ends, dtype=torch.int32)
            leaves = [x[0].clone().requires_grad_() for x in tensors[:3]]
            out = foveate.attention_varlen(*leaves, cu, cu, 48, 48, **options)
            wanted = [out, *torch.autograd.grad(out, leaves, tensors[3][0])]
            for layout in ring_layout.LAYOUTS:
                for name, value in zip(("out", "dq", "dk", "dv"), wanted):
                    difference = float((next(found)[0] - value.detach()).abs().max())
                    assert difference < 1e-11, (options, ends, layout, name, difference)
    assert next(found, None) is None


def rank_repeats(rank: int, seed: int) -> list[torch.Tensor]:
    case = _C(sq=48, skv=48, hkv=2, causal=True, dtype=torch.bfloat16)
    first, second = (whole_results(case, seed, "zigzag", None) for _ in range(2))
    return [first[name].view(torch.uint8) for name in first] + [second[name].view(torch.uint8) for name in second]


def test_repeats_bit_for_bit(seed, tmp_path):
    found = run_ranks(rank_repeats, 3, tmp_path, seed)[0]
    half = len(found) // 2
    assert all(torch.equal(a, b) for a, b in zip(found[:half], found[half:]))


def rank_edges(rank: int) -> list[str]:
    """Sentences of the calls that are refused on every rank, and the group still works after each."""
    q = torch.randn(1, 4, 2, 8)
    other = torch.randn(1, 6, 2, 8)
    mine = q if rank == 0 else other
    calls = {
        "shapes": lambda: foveate.ring_attention(mine, mine, mine),
        "options": lambda: foveate.ring_attention(q, q, q, causal=rank == 0),
        "gradients": lambda: foveate.ring_attention(q.clone().requires_grad_(rank == 0), q, q),
        "odd": lambda: foveate.ring_attention(q[:, :3], q[:, :3], q[:, :3]),
        "layout": lambda: foveate.ring_attention(q, q, q, layout="striped"),
        "dropout": lambda: foveate.ring_attention(q, q, q, dropout_p=0.1),
        "mask": lambda: foveate.ring_attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool)),
        "unknown": lambda: foveate.ring_attention(q, q, q, casual=True),
        "sequences": lambda: foveate.ring_attention(q, q, q, cu_seqlens=[0, 3 + rank, 8]),
        "short": lambda: foveate.ring_attention(q, q, q, cu_seqlens=[0, 4]),
        "falling": lambda: foveate.ring_attention(q, q, q, cu_seqlens=[0, 5, 3, 8]),
        "rows": lambda: foveate.ring_attention(*[q.expand(2, 4, 2, 8)] * 3, cu_seqlens=[0, 8]),
        "split": lambda: ring_layout.split_sequence(torch.zeros(1, 10)),
    }
    sentences = []
    for name, call in calls.items():
        try:
            call()
            sentences.append(f"{name}: was accepted")
        except (ValueError, TypeError) as error:
            sentences.append(f"{name}: {error}")
        dist.barrier()
    out = foveate.ring_attention(q[:0], q[:0], q[:0], dropout_p=0.0, mask=None)
    none = foveate.ring_attention(q[:, :0], q[:, :0], q[:, :0])
    return [*sentences, f"empty: {tuple(out.shape)} {tuple(none.shape)}"]


def test_errors_on_every_rank(tmp_path):
    wanted = [
        r"shapes: ranks 0 and 1 .* Sq 4 and 6; Skv 4 and 6",
        r"options: .*window right \(0: causal\) 0 and -1",
        r"gradients: .*gradients recorded 1 and 0",
        r"odd: a rank holds 3 tokens; .* even",
        r"layout: layout='striped' is unknown; choose one of zigzag, contiguous",
        r"dropout: ring_attention does not take dropout_p",
        r"mask: ring_attention does not take mask",
        r"unknown: ring_attention has no option 'casual'",
        r"sequences: .*checksum of cu_seqlens",
        r"short: cu_seqlens=\[0, 4\] must rise from 0 to 8, the 4 tokens of each of 2 ranks",
        r"falling: cu_seqlens=\[0, 5, 3, 8\] must rise",
        r"rows: packed sequences are one row of queries and keys, B = 1 and Sq = Skv; here B=2",
        r"split: 10 tokens cannot be split over 2 ranks .* to 12, with labels of -100",
        r"empty: \(0, 4, 2, 8\) \(1, 0, 2, 8\)",
    ]
    for sentences in run_ranks(rank_edges, 2, tmp_path):
        for pattern, sentence in zip(wanted, sentences):
            assert re.match(pattern, sentence), sentence
        assert len(sentences) == len(wanted)


def rank_subgroup(rank: int) -> list[torch.Tensor]:
    """Ranks 3, 1 and 2 of four as a ring of their own, and one of rank 0 alone."""
    group, single = dist.new_group([1, 2, 3]), dist.new_group([0])
    torch.manual_seed(0)
    x = torch.randn(1, 12, 2, 8)
    mine = group if rank else single
    part = ring_layout.split_sequence(x, group=mine)
    out = foveate.ring_attention(part, part, part, causal=True, group=mine)
    return [ring_layout.gather_sequence(out, group=mine), foveate.attention(x, x, x, causal=True)]


def test_group_of_some_ranks(tmp_path):
    for ours, whole in run_ranks(rank_subgroup, 4, tmp_path):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-6)


def rank_layout(rank: int) -> list[torch.Tensor]:
    x = torch.arange(24).view(1, 24)
    found = []
    for layout in ring_layout.LAYOUTS:
        part = ring_layout.split_sequence(x, layout=layout)
        assert torch.equal(part[0], ring_layout.sequence_positions(24, layout=layout))
        assert torch.equal(ring_layout.gather_sequence(part, layout=layout), x)
        found.append(part[0])
    return found


def test_split_and_gather(tmp_path):
    zigzag, contiguous = zip(*run_ranks(rank_layout, 3, tmp_path))
    assert [x.tolist() for x in zigzag] == [[*range(i, i + 4), *range(20 - i, 24 - i)] for i in (0, 4, 8)]
    assert [x.tolist() for x in contiguous] == [list(range(i, i + 8)) for i in (0, 8, 16)]


def test_zigzag_gives_each_rank_the_same_work():
    size, length = 4, 16

    def pairs(rank: int, layout: str) -> int:
        mine = torch.cat([torch.arange(s.position, s.position + s.length)
                          for s in ring_layout.spans(rank, size, length, layout)])  # fmt: skip
        return int((mine + 1).sum())

    assert len({pairs(rank, "zigzag") for rank in range(size)}) == 1
    assert len({pairs(rank, "contiguous") for rank in range(size)}) == size


@pytest.mark.parametrize("left, right", [(-1, -1), (-1, 0), (3, 0), (5, 2), (0, 9), (-1, 4), (2, -1), (0, 0)])
def test_blocks_are_the_window(left, right):
    """Of every pair of spans, the visible pairs of the block are those of the definition."""
    for row_at, key_at, rows, keys in [
        (0, 0, 6, 6),
        (6, 0, 6, 6),
        (0, 6, 6, 6),
        (4, 0, 3, 8),
        (0, 9, 5, 4),
        (2, 3, 7, 2),
    ]:
        for offset in (-4, 0, 5):
            i = torch.arange(rows)[:, None] + row_at + offset
            j = torch.arange(keys) + key_at
            wanted = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
            visible = torch.zeros(rows, keys, dtype=torch.bool)
            found = ring_layout.block(
                ring_layout.Span(row_at, 0, rows), ring_layout.Span(key_at, 0, keys), offset, left, right
            )
            if found is not None:
                part = visible[found.rows, found.keys]
                n, m = part.shape
                distance = torch.arange(m) - (torch.arange(n)[:, None] + m - n)
                assert min(found.window) >= -1
                before, after = found.window
                part |= ((distance >= -before) | (before < 0)) & ((distance <= after) | (after < 0))
            assert torch.equal(visible, wanted)


def test_without_a_group():
    if dist.is_initialized():
        pytest.skip("this process is in a group")
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="needs torch.distributed: call .*init_process_group"):
        foveate.ring_attention(q, q, q)
