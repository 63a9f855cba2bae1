"""Block sizes of the Triton kernels: pure functions, tested without a kernel."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")

from foveate.backend.triton import config
from foveate.backend.triton.tiles import parts


@pytest.mark.parametrize("width", range(1, 577))
def test_parts_hold_the_width_in_powers_of_two(width):
    first, second = parts(width)
    assert first >= 16
    assert first & (first - 1) == 0
    assert second & (second - 1) == 0
    assert second != 0 or first >= width
    assert first + second >= width
    assert first + second <= max(16, 2 ** (width - 1).bit_length()), "no more than one power of two that holds it"


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (64, (64, 0)),
        (72, (64, 16)),
        (80, (64, 16)),
        (96, (64, 32)),
        (112, (128, 0)),
        (192, (128, 64)),
        (576, (512, 64)),
    ],
)
def test_parts_waste_little(width, expected):
    assert parts(width) == expected


@pytest.mark.parametrize(
    ("width", "expected"), [(8, (16, 0)), (32, (16, 16)), (96, (64, 32)), (128, (64, 64)), (120, (64, 64))]
)
def test_halves(width, expected):
    assert parts(width, halves=True) == expected


def test_heads_are_packed_for_short_queries_only():
    assert config.packs(1, 8, 16)
    assert config.packs(20, 4, 128)
    assert not config.packs(1, 1, 16)
    assert not config.packs(4096, 8, 128)
    assert not config.packs(128, 4, 128)


def test_blocks_are_powers_of_two_and_fit_the_rows():
    dtypes, dims, archs = (torch.float32, torch.bfloat16), (8, 64, 80, 128, 192, 256), (0, 80, 90, 100)
    for dtype, D, rows, arch in itertools.product(dtypes, dims, (1, 16, 17, 100, 5000), archs):
        chosen = config.forward(D, D, dtype, rows, arch)
        for size in (chosen.block_m, chosen.block_n):
            assert size >= 16
            assert size & (size - 1) == 0
        assert chosen.block_m == 16 or chosen.block_m < 2 * rows, "half of the rows of a block may be empty, not more"
        assert all(c.warps in (4, 8) for c in (chosen, *config.backward(D, D, dtype, rows, arch)))


CHIPS = (config.INTERPRETER, config.CDNA, config.RDNA, config.XE, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def test_families():
    names = [
        "sm_80",
        "cdna",
        "rdna",
        "sm_86",
        "sm_80",
        "sm_86",
        "sm_80",
        "sm_86",
        "sm_90",
        *["sm_100"] * 3,
        "sm_86",
        "sm_86",
    ]
    assert [config.family(arch) for arch in CHIPS] == names
    assert config.shared_memory(120) < 100 * 1024 < config.shared_memory(80) < config.shared_memory(100)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("D", [8, 40, 64, 80, 96, 128, 192, 256])
def test_tiles_fit_the_shared_memory(D, arch):
    """One stage of the rows that pass and, but on AMD's chips where they are in registers, those that stay: what the compiler needs at
    least. test_triton_compile.py sees all of it."""
    stays = arch not in (config.CDNA, config.RDNA)
    for dtype in (torch.bfloat16, torch.float32):
        width = sum(parts(D)) * dtype.itemsize
        for rows in (1, 64, 4096):
            chosen = config.forward(D, D, dtype, rows, arch)
            assert (stays * chosen.block_m + 2 * chosen.block_n) * width <= config.shared_memory(arch)
        for chosen in config.backward(D, D, dtype, 4096, arch):
            assert 2 * (stays * chosen.block_m + chosen.block_n) * width <= config.shared_memory(arch)


def test_entries_of_the_table_belong_to_one_chip():
    entry = config.Config(64, 64, 4, 2)
    with config.table_is({config.key("forward", 128, torch.bfloat16, 4096, config.CDNA): entry}):
        assert config.forward(128, 128, torch.bfloat16, 4096, config.CDNA) == entry
        assert config.forward(128, 128, torch.bfloat16, 4096, config.RDNA) != entry
        assert config.forward(128, 128, torch.float32, 4096, config.CDNA) != entry
    assert config.forward(128, 128, torch.bfloat16, 4096, config.CDNA) != entry
