"""The pure functions of cuda/attention/config.h and cuda/kv_cache/decode_layout.h: tiles, instances, packed heads, the order of blocks."""

from __future__ import annotations

import collections
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEAST_SHARED_MEMORY = 99 * 1024  # what a block may have on sm_86 and sm_89
REGISTERS = 64 * 1024  # of an SM
PLAIN, PAGED, GENERAL = range(3)  # ForwardKind

Lines = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def decisions(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    program = tmp_path_factory.mktemp("config") / "flash_config_check"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'emulator' / 'include'}"]  # the latter for cuda_runtime.h
    source = ROOT / "tests" / "native" / "flash_config_check.cpp"
    subprocess.run(
        [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", *includes, source, "-o", program], check=True
    )
    lines: Lines = collections.defaultdict(list)
    for line in subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines():
        name, *numbers = line.split()
        lines[name].append([int(n) for n in numbers])
    return lines


def test_tiles_fit_every_gpu(decisions: Lines) -> None:
    """Shared memory of a block, and the registers that scores and output alone take."""
    assert len(decisions["tile"]) == 18
    for d, dv, _, element_bytes, rows_per_warp, rows, keys, shared_bytes, blocks_per_sm in decisions["tile"]:
        threads = rows // rows_per_warp * 32
        assert shared_bytes == element_bytes * (rows * d + keys * (d + dv)) <= LEAST_SHARED_MEMORY
        assert rows_per_warp in (16, 32) and threads in (64, 128)
        available = min(255, REGISTERS // (threads * blocks_per_sm) // 8 * 8)
        assert rows_per_warp * (keys + dv) // 32 <= available - 48, (d, dv)


def test_the_number_of_keys_depends_on_nothing_but_type_and_head_dim(decisions: Lines) -> None:
    """So that a row's bits do not depend on which instance computes it."""
    assert {keys for _, _, _, size, _, _, keys, _, _ in decisions["tile"] if size == 2} == {64}


def test_the_smallest_instance_that_holds_the_head_dims(decisions: Lines) -> None:
    instances = {
        kind: [(d, dv) for d, dv, of_kind, size, *_ in decisions["tile"] if of_kind == kind and size == 2]
        for kind in (PLAIN, PAGED, GENERAL)
    }
    for kind, d, dv, chosen_d, chosen_dv in decisions["dims"]:
        able = [(x, y) for x, y in instances[kind] if d <= x and dv <= y]
        assert (chosen_d, chosen_dv) == min(able), (kind, d, dv)


def test_the_general_instance_is_for_what_no_other_can(decisions: Lines) -> None:
    """Options on scores, fp32, rows at any address, pages whose size is no power of two."""
    assert len(decisions["kind"]) == 48
    for options, vector_loads, element_bytes, page_size, kind in decisions["kind"]:
        special = options or not vector_loads or element_bytes == 4 or page_size in (7, 48)
        assert kind == (GENERAL if special else PAGED if page_size else PLAIN)


def test_decode_fits_every_gpu(decisions: Lines) -> None:
    """Up to the head dims of MLA. A warp has keys under way while it computes, unless two stages of one warp do not fit."""
    assert len(decisions["decode"]) == 24
    for q_size, kv_size, d, dv, warps, stages, shared_bytes in decisions["decode"]:
        assert (shared_bytes <= LEAST_SHARED_MEMORY) == ((q_size, d) != (4, 1024)), (q_size, kv_size, d)
        assert stages == (1 if q_size * d >= 2048 else 2), (q_size, kv_size, d)
        assert warps == 4 or (warps in (1, 2) and q_size * max(d, dv) > 256), (q_size, kv_size, d)


def test_heads_are_packed_where_tiles_would_be_empty(decisions: Lines) -> None:
    packed = {(group, seq_q): n for group, seq_q, n in decisions["pack"]}
    assert all(n in (1, group) for (group, _), n in packed.items())
    assert all(packed[group, seq_q] == group for group in (4, 8, 16) for seq_q in (1, 3, 16))
    assert packed[2, 64] == 2 and packed[8, 129] == 8
    assert all(packed[group, seq_q] == 1 for group in (1, 2, 4, 8, 16) for seq_q in (128, 1000, 4096))


def test_rows_of_packed_heads_divide_exactly(decisions: Lines) -> None:
    """Packing ends where sequences are longer than 4 tiles, and with more than 128 heads."""
    packed = [(group, rows) for group, rows, _ in decisions["inverse"] if rows > 0]
    assert [group for group, _ in packed] == [2, 3, 7, 48, 71, 127, 128]
    assert all(exact for _, _, exact in decisions["inverse"])


def test_every_tile_of_every_head_is_one_block(decisions: Lines) -> None:
    for heads, tiles, _, *pairs in decisions["grid"]:
        blocks = list(zip(pairs[::2], pairs[1::2]))
        assert sorted(blocks) == [(head, tile) for head in range(heads) for tile in range(tiles)]


def test_last_rows_come_first_within_a_section_of_heads(decisions: Lines) -> None:
    assert [section for _, _, section, *_ in decisions["grid"]] == [6, 3, 1, 3, 1]
    for _, _, section, *pairs in decisions["grid"]:
        blocks = list(zip(pairs[::2], pairs[1::2]))
        assert blocks == sorted(blocks, key=lambda block: (block[0] // section, -block[1], block[0]))
