"""What the CUDA backward promises beyond right gradients: which instance runs, memory, the same bits under every schedule.

In the emulator's build. The gradients themselves: test_attention_backward.py."""

from __future__ import annotations

import pytest
import torch

import compare
from cases import AttentionCase, make_inputs
from foveate.backend.native import _C
from foveate.ops.attention import op as attention_op
from kv_cases import BF16, F16, F32, KvCase, make_kv_inputs

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(_C is None or not _C.cuda_emulated, reason="needs the emulator's build"),
]


def gradients(case: AttentionCase, seed: int, **options) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case, seed, "cpu")
    return compare.results(inputs, lambda x: x.run("native", **options), compare.upstream(inputs, seed))


@pytest.mark.parametrize("d", range(8, 257, 8))
def test_every_head_dim(d, seed):
    """Multiples of 8 up to 256, v as wide as another multiple."""
    case = AttentionCase(b=1, sq=18, skv=21, hq=2, hkv=1, d=d, dv=264 - d, causal=True, dtype=BF16 if d % 16 else F16)
    compare.assert_case_as_good_as_torch(
        case, seed, "native", "cpu", "compare.assert_case_as_good_as_torch", backward=True
    )


@pytest.mark.parametrize(
    ("d", "dtype", "tile"),
    [(64, BF16, 64), (72, F16, 96), (96, BF16, 96), (104, BF16, 128), (136, F16, 256), (96, F32, 128)],
)
def test_the_smallest_tile_that_holds_the_head_dim(d, dtype, tile, launched, seed):
    case = AttentionCase(b=1, sq=20, skv=20, hq=1, hkv=1, d=d, dv=40, dtype=dtype)
    names = launched(lambda: gradients(case, seed, deterministic=True))
    tiled = [name for name in names if "BackwardTiles" in name]
    assert len(tiled) >= 2 and all(f", {tile}>" in name for name in tiled), names


def test_dq_comes_with_dk_and_dv_unless_bits_must_be_equal(launched, seed):
    case = AttentionCase(b=1, sq=20, skv=20, hq=1, hkv=1, d=64, dtype=BF16)

    def kernels(deterministic: bool) -> list[str]:
        names = launched(lambda: gradients(case, seed, deterministic=deterministic))
        return [name.split("<")[0].split("::")[-1] for name in names]

    assert kernels(True)[1:] == ["row_statistics", "key_gradients", "query_gradient"]
    assert kernels(False)[1:] == ["row_statistics", "key_gradients", "round_query_gradient"]


@pytest.mark.parametrize(
    "options", [{}, {"sinks": True}, {"relative": "bidirectional"}, {"causal": True, "kv_lens": True}], ids=str
)
def test_the_deterministic_backward_needs_memory_that_grows_as_the_sequence(options, seed, monkeypatch):
    sizes = []

    def recorded(*size: int, **kwargs) -> torch.Tensor:
        if kwargs.get("dtype") is torch.int8:
            sizes.append(size[0])
        return empty(*size, **kwargs)

    empty = torch.empty
    monkeypatch.setattr(attention_op.torch, "empty", recorded)
    for length in (128, 256, 512):
        gradients(
            AttentionCase(b=1, sq=length, skv=length, hq=1, hkv=1, d=8, dtype=BF16, **options), seed, deterministic=True
        )
    assert len(sizes) == 3 and sizes[0] > 0
    assert sizes[2] - sizes[1] == 2 * (sizes[1] - sizes[0]), sizes


@pytest.mark.parametrize(("schedule", "seed_of_it"), [("random", 1), ("priority", 2)])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_schedule_gives_the_same_bits(dtype, schedule, seed_of_it, seed, monkeypatch):
    case = AttentionCase(
        b=2,
        sq=70,
        skv=90,
        hq=4,
        hkv=2,
        causal=True,
        bias="1h1k",
        relative="backward",
        sinks=True,
        dropout=0.1,
        dtype=dtype,
    )
    expected = gradients(case, seed, deterministic=True)
    monkeypatch.setenv("FOVEATE_EMULATOR_SCHEDULE", schedule)
    monkeypatch.setenv("FOVEATE_EMULATOR_SEED", str(seed_of_it))
    for name, value in gradients(case, seed, deterministic=True).items():
        assert torch.equal(value, expected[name]), name


def test_a_decode_step_is_one_launch_and_its_append_another(launched, seed):
    """The last block of a tile of rows merges the splits."""
    inputs = make_kv_inputs(KvCase(dtype=BF16, d=64, longest=600, hq=8, rotary=16, num_splits=4), seed)
    names = [name.split("<")[0].split("::")[-1] for name in launched(lambda: inputs.run("native"))]
    assert len(names) == 2 and "append" in names[0] and names[1] == "decode_kernel"
    without = make_kv_inputs(KvCase(dtype=BF16, d=64, longest=600, hq=8, new=False, num_splits=4), seed)
    assert len(launched(lambda: without.run("native"))) == 1
