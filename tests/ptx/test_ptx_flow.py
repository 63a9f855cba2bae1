"""Divergence, warp operations, barriers, memories and checks of the PTX machine, by PTX written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ptx_programs import Failed, run_text

LANES = np.arange(32, dtype=np.uint32)
NOTHING = np.zeros(32, np.uint32)
STORE = "\tst.global.u32 [%rd2], %r9;\n"
SCHEDULES = [("round-robin", 0), ("random", 1), ("random", 2), ("random", 3)]

IF_ELSE = """
	setp.lt.u32 %p1, %r1, 10;
	@%p1 bra $small;
	mov.u32 %r9, 200;
	bra.uni $end;
$small:
	mov.u32 %r9, 100;
$end:
	add.s32 %r9, %r9, %r1;
"""
NESTED = """
	and.b32 %r2, %r1, 1;
	setp.eq.s32 %p1, %r2, 0;
	@%p1 bra $even;
	mov.u32 %r9, 1;
	bra.uni $end;
$even:
	and.b32 %r3, %r1, 2;
	setp.eq.s32 %p2, %r3, 0;
	@%p2 bra $four;
	mov.u32 %r9, 2;
	bra.uni $inner;
$four:
	mov.u32 %r9, 4;
$inner:
	shl.b32 %r9, %r9, 4;
$end:
	add.s32 %r9, %r9, 3;
"""
# Each lane goes around as often as its number says.
LOOP = """
	mov.u32 %r9, 0;
	mov.u32 %r2, 0;
$loop:
	setp.ge.u32 %p1, %r2, %r1;
	@%p1 bra $end;
	add.s32 %r9, %r9, %r2;
	add.s32 %r2, %r2, 1;
	bra.uni $loop;
$end:
	add.s32 %r9, %r9, 1;
"""
# A loop inside a branch, left in its middle by some lanes.
BREAK = """
	mov.u32 %r9, 0;
	setp.lt.u32 %p1, %r1, 8;
	@%p1 bra $end;
$loop:
	add.s32 %r9, %r9, 1;
	mul.lo.s32 %r3, %r9, 3;
	setp.eq.s32 %p2, %r3, %r1;
	@%p2 bra $found;
	setp.lt.u32 %p3, %r9, %r1;
	@%p3 bra $loop;
	bra.uni $end;
$found:
	add.s32 %r9, %r9, 1000;
$end:
	add.s32 %r9, %r9, 5;
"""
# The warp is together again behind each of these: a shuffle of all lanes shows it.
ROTATE = """
	add.s32 %r20, %r1, 1;
	shfl.sync.idx.b32 %r9|%p9, %r9, %r20, 31, -1;
"""


def small(lane: int) -> int:
    return (100 if lane < 10 else 200) + lane


def nested(lane: int) -> int:
    return (1 if lane % 2 else (2 if lane & 2 else 4) << 4) + 3


def left_in_the_middle(lane: int) -> int:
    if lane < 8:
        return 5
    return (lane // 3 + 1000 if lane % 3 == 0 else lane) + 5


PATTERNS = {
    "if and else": (IF_ELSE, small),
    "nested": (NESTED, nested),
    "loop of different lengths": (LOOP, lambda lane: lane * (lane - 1) // 2 + 1),
    "left in the middle": (BREAK, left_in_the_middle),
}


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
@pytest.mark.parametrize("name", PATTERNS)
def test_divergence(machine: Path, tmp_path: Path, name: str, schedule: str, seed: int) -> None:
    text, expected = PATTERNS[name]
    out = run_text(machine, tmp_path, text + ROTATE + STORE, NOTHING, 32, schedule=schedule, seed=seed).out
    assert out.tolist() == [expected((lane + 1) % 32) for lane in range(32)]


def test_lanes_that_return_early_are_not_waited_for(machine: Path, tmp_path: Path) -> None:
    early = (
        "\tmov.u32 %r9, 1;\n\tsetp.lt.u32 %p1, %r1, 5;\n\t@!%p1 bra $rest;\n"
        + STORE
        + "\tbra.uni $out;\n$rest:\n\tbar.sync 0;\n\tmov.u32 %r9, 2;\n"
    )
    out = run_text(machine, tmp_path, early + STORE + "$out:\n", np.zeros(64, np.uint32), 64, threads=64).out
    assert out.tolist() == [1] * 5 + [2] * 59


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
@pytest.mark.parametrize(
    "operation",
    ["shfl.sync.bfly.b32 %r9|%p9, %r1, 1, 31, -1", "bar.sync 0", "vote.sync.ballot.b32 %r9, %p1, -1",
     "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%f9, %f9, %f9, %f9}"],
)  # fmt: skip
def test_a_warp_operation_in_a_branch_is_reported(
    machine: Path, tmp_path: Path, operation: str, schedule: str, seed: int
) -> None:
    text = f"""
	mov.f32 %f9, 0f00000000;
	mov.u32 %r9, 0;
	setp.lt.u32 %p1, %r1, 10;
	@%p1 bra $end;
	{operation};
$end:
	add.s32 %r9, %r9, 1;
"""
    with pytest.raises(Failed, match=r"PTX line \d+: .*divergence: lane 10 comes here without lane 0"):
        run_text(machine, tmp_path, text + STORE, NOTHING, 32, schedule=schedule, seed=seed)


SHUFFLES = {
    "bfly": ("bfly.b32 %r9|%p1, %r1, 5, 31, -1", lambda lane: lane ^ 5),
    "bfly in segments of 8": (
        "bfly.b32 %r9|%p1, %r1, 9, 6175, -1",
        lambda lane: lane ^ 9 if lane ^ 9 <= lane | 7 else lane,
    ),
    "idx": ("idx.b32 %r9|%p1, %r1, 7, 31, -1", lambda lane: 7),
    "idx in segments of 8": ("idx.b32 %r9|%p1, %r1, 3, 6175, -1", lambda lane: lane // 8 * 8 + 3),
    "up": ("up.b32 %r9|%p1, %r1, 3, 0, -1", lambda lane: lane - 3 if lane >= 3 else lane),
    "down": ("down.b32 %r9|%p1, %r1, 3, 31, -1", lambda lane: lane + 3 if lane + 3 < 32 else lane),
}


READ_THEMSELVES = {"idx": [7], "idx in segments of 8": [3, 11, 19, 27]}


@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles(machine: Path, tmp_path: Path, name: str) -> None:
    text, source = SHUFFLES[name]
    # bit 16: the predicate, whether the lane read is inside
    body = f"\tshfl.sync.{text};\n\tselp.u32 %r3, 65536, 0, %p1;\n\tadd.s32 %r9, %r9, %r3;\n"
    out = run_text(machine, tmp_path, body + STORE, NOTHING, 32).out
    for lane in range(32):
        inside = source(lane) != lane or lane in READ_THEMSELVES.get(name, [])
        assert out[lane] == source(lane) + (65536 if inside else 0)


def test_votes(machine: Path, tmp_path: Path) -> None:
    text = """
	and.b32 %r2, %r1, 3;
	setp.eq.s32 %p1, %r2, 1;
	vote.sync.ballot.b32 %r9, %p1, -1;
	setp.lt.u32 %p2, %r1, 99;
	vote.sync.all.pred %p3, %p2, -1;
	vote.sync.any.pred %p4, %p1, -1;
	vote.sync.all.pred %p5, %p1, -1;
	selp.u32 %r3, 1, 0, %p3;
	selp.u32 %r4, 2, 0, %p4;
	selp.u32 %r5, 4, 0, %p5;
	or.b32 %r3, %r3, %r4;
	or.b32 %r3, %r3, %r5;
	st.global.u32 [%rd2+128], %r3;
"""
    out = run_text(machine, tmp_path, text + STORE, NOTHING, 64).out
    assert out.tolist() == [0x22222222] * 32 + [3] * 32


def exchange(threads: int, between: str) -> str:
    """Each thread writes a word of shared memory and reads that of the last thread but its own number."""
    return f"""
	mov.u32 %r2, dynamic;
	shl.b32 %r3, %r1, 2;
	add.s32 %r4, %r2, %r3;
	st.shared.u32 [%r4], %r1;
	{between}
	mov.u32 %r5, {4 * (threads - 1)};
	sub.s32 %r5, %r5, %r3;
	add.s32 %r5, %r2, %r5;
	ld.shared.u32 %r9, [%r5];
"""


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_a_barrier_orders_shared_memory(machine: Path, tmp_path: Path, schedule: str, seed: int) -> None:
    out = run_text(
        machine,
        tmp_path,
        exchange(128, "bar.sync 0;") + STORE,
        np.zeros(128, np.uint32),
        128,
        threads=128,
        schedule=schedule,
        seed=seed,
    ).out
    assert out.tolist() == list(range(127, -1, -1))


@pytest.mark.parametrize("schedule, seed", SCHEDULES)
def test_a_missing_barrier_is_a_race(machine: Path, tmp_path: Path, schedule: str, seed: int) -> None:
    with pytest.raises(Failed, match="race on byte .* of shared memory: .*no barrier between them"):
        run_text(
            machine,
            tmp_path,
            exchange(128, "") + STORE,
            np.zeros(128, np.uint32),
            128,
            threads=128,
            schedule=schedule,
            seed=seed,
        )


def test_within_a_warp_bar_warp_sync_orders(machine: Path, tmp_path: Path) -> None:
    out = run_text(machine, tmp_path, exchange(32, "bar.warp.sync -1;") + STORE, NOTHING, 32).out
    assert out.tolist() == list(range(31, -1, -1))
    with pytest.raises(Failed, match="race on byte .* of shared memory: .*no sync_warp between them"):
        run_text(machine, tmp_path, exchange(32, "") + STORE, NOTHING, 32)


def test_a_barrier_with_a_vote(machine: Path, tmp_path: Path) -> None:
    for wanted in (77, 200):
        text = f"\tsetp.eq.s32 %p1, %r1, {wanted};\n\tbar.red.or.pred %p2, 0, %p1;\n\tselp.u32 %r9, 1, 0, %p2;\n"
        out = run_text(machine, tmp_path, text + STORE, np.zeros(128, np.uint32), 128, threads=128).out
        assert out.tolist() == [int(wanted < 128)] * 128


def test_a_barrier_that_some_do_not_reach_is_a_deadlock(machine: Path, tmp_path: Path) -> None:
    text = """
	mov.u32 %r9, 0;
	setp.lt.u32 %p1, %r1, 64;
	@%p1 bra $first;
	bar.sync 2, 128;
	bra.uni $end;
$first:
	bar.sync 1, 128;
$end:
	add.s32 %r9, %r9, 1;
"""
    with pytest.raises(
        Failed, match=r"deadlock: warp 0 waits at PTX line \d+: bar.sync 1, 128.*barrier 1 has 64 threads of 128"
    ):
        run_text(machine, tmp_path, text + STORE, np.zeros(128, np.uint32), 128, threads=128)


COPY = """
	mov.u32 %r2, dynamic;
	shl.b32 %r3, %r1, 4;
	add.s32 %r4, %r2, %r3;
	ld.param.u64 %rd4, [in];
	mul.wide.u32 %rd5, %r1, 16;
	add.s64 %rd4, %rd4, %rd5;
	setp.lt.u32 %p1, %r1, 16;
	selp.b32 %r6, 16, 0, %p1;
	cp.async.cg.shared.global.L2::128B [%r4], [%rd4], 16, %r6;
	cp.async.commit_group;
"""


def test_asynchronous_copies_arrive_at_their_wait(machine: Path, tmp_path: Path) -> None:
    words = np.arange(64, dtype=np.uint32) + 1000  # of 16 lanes: the others' addresses are outside, and not read
    out = run_text(
        machine, tmp_path, COPY + "\tcp.async.wait_group 0;\n\tld.shared.u32 %r9, [%r4+8];\n" + STORE, words, 32
    ).out
    assert out.tolist() == [1002 + 4 * lane for lane in range(16)] + [0] * 16
    with pytest.raises(Failed, match="under way: it has not been waited for"):
        run_text(
            machine, tmp_path, COPY + "\tcp.async.wait_group 1;\n\tld.shared.u32 %r9, [%r4+8];\n" + STORE, words, 32
        )
    with pytest.raises(Failed, match="returns with an asynchronous copy under way"):
        run_text(machine, tmp_path, COPY, words, 32)


def test_shared_memory_begins_as_nan(machine: Path, tmp_path: Path) -> None:
    out = run_text(
        machine, tmp_path, "\tmov.u32 %r2, dynamic;\n\tld.shared.u32 %r9, [%r2+40];\n" + STORE, NOTHING, 32
    ).out
    assert out.tolist() == [0xFFFFFFFF] * 32


@pytest.mark.parametrize(
    "text, message",
    [
        ("ld.global.u32 %r9, [%rd1+4];", "ld.global.u32 of 4 bytes .* the nearest is in"),
        ("ld.global.v2.u32 {%r9, %r8}, [%rd1];", "the address is not a multiple of 8"),
        ("mov.u32 %r2, dynamic;\n ld.shared.u32 %r9, [%r2+4096];", "outside the block's 4096 bytes of shared memory"),
        ("mov.u32 %r2, dynamic;\n ld.shared.u32 %r9, [%r2+2];", "is not a multiple of 4"),
        ("mov.u32 %r2, 64;\n ld.shared.u32 %r9, [%r2];", "is outside the block's"),
        ("ld.param.u64 %rd9, [out+8];\n mov.u32 %r9, 0;", "byte 16 of the parameters, for 8 bytes of 16"),
        ("st.global.u32 [%rd1], %r1;\n bar.warp.sync -1;\n ld.global.nc.u32 %r9, [%rd1];", "read-only path may not see it"),
    ],
)  # fmt: skip
def test_wrong_accesses_are_reported_with_the_line(machine: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Failed, match=rf"block \(0, 0, 0\), warp 0, PTX line \d+: .*{message}"):
        run_text(machine, tmp_path, f"\t{text}\n" + STORE, NOTHING, 32)


def test_blocks_that_write_the_same_word_race(machine: Path, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="race on byte .* of out in global memory"):
        run_text(machine, tmp_path, "\tmov.u32 %r9, 3;\n" + STORE, NOTHING, 32, blocks=2)


def test_atomic_additions_do_not_race(machine: Path, tmp_path: Path) -> None:
    text = """
	ld.param.u64 %rd9, [in];
	mov.f32 %f1, 0f3F800000;
	atom.global.add.f32 %f2, [%rd9+4], %f1;
	mov.u32 %r2, dynamic;
	setp.ne.s32 %p1, %r1, 0;
	@%p1 bra $others;
	st.shared.f32 [%r2], %f1;
$others:
	bar.sync 0;
	red.shared.add.f32 [%r2], %f1;
	bar.sync 0;
	ld.global.f32 %f3, [%rd9+4];
	ld.shared.f32 %f4, [%r2];
	mul.f32 %f3, %f3, 0f447A0000;
	add.f32 %f3, %f3, %f4;
	st.global.f32 [%rd2], %f3;
"""
    out = run_text(machine, tmp_path, text, NOTHING, 64, threads=64).out
    assert out.view(np.float32).tolist() == [64 * 1000 + 65] * 64


def test_registers_inside_braces_hide_those_outside(machine: Path, tmp_path: Path) -> None:
    text = """
	mov.u32 %r2, 5;
	{
	.reg .b32 %r2;
	.reg .b32 own;
	mov.u32 %r2, 7;
	add.s32 own, %r2, %r1;
	mov.u32 %r9, own;
	}
	{ .reg .b32 own;
	mov.u32 own, 100; add.s32 %r9, %r9, own; }
	mad.lo.s32 %r9, %r2, 1000, %r9;
"""
    out = run_text(machine, tmp_path, text + STORE, NOTHING, 32).out
    assert out.tolist() == [5107 + lane for lane in range(32)]


def test_what_nobody_has_written_may_be_computed_with_but_not_stored(machine: Path, tmp_path: Path) -> None:
    text = """
	setp.lt.u32 %p1, %r1, 20;
	@!%p1 bra $end;
	mov.u32 %r3, 7;
$end:
	mov.u32 %r4, %r3;
	mov.u32 %r9, 1;
	@%p1 add.s32 %r9, %r4, 1;
"""
    assert run_text(machine, tmp_path, text + STORE, NOTHING, 32).out.tolist() == [8] * 20 + [1] * 12
    with pytest.raises(Failed, match="lane 20 reads a register that nobody has written"):
        run_text(machine, tmp_path, text + "\tadd.s32 %r9, %r4, 2;\n" + STORE, NOTHING, 32)


def test_special_registers(machine: Path, tmp_path: Path) -> None:
    text = """
	mov.u32 %r2, %ctaid.x;
	mov.u32 %r3, %ntid.x;
	mad.lo.s32 %r4, %r2, %r3, %r1;
	mov.u32 %r5, %nctaid.x;
	mad.lo.s32 %r9, %r5, 1000, %r4;
	mul.wide.u32 %rd9, %r4, 4;
	ld.param.u64 %rd10, [out];
	add.s64 %rd10, %rd10, %rd9;
	st.global.u32 [%rd10], %r9;
"""
    out = run_text(machine, tmp_path, text, NOTHING, 192, blocks=3, threads=64).out
    assert out.tolist() == [3000 + k for k in range(192)]


def test_an_endless_loop_ends(machine: Path, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="an endless loop"):
        run_text(machine, tmp_path, "$loop:\n\tbra.uni $loop;\n", NOTHING, 32)
