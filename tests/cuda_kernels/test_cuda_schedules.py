"""The same bits whatever the order in which the warps of a block run, with the race detector on: rows, the append to a KV cache and decode,
a small case for each way through a kernel. In the emulator's build."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import foveate
from foveate.backend.native import _C
from kv_cases import BF16, F8, F16, F32, I8, KvCase, bits, make_kv_inputs

pytestmark = [
    pytest.mark.emulated,
    pytest.mark.skipif(_C is None or not _C.cuda_emulated, reason="needs the emulator's build"),
]

SCHEDULES = [("random", seed) for seed in range(3)] + [("priority", seed) for seed in range(3)]


def rows_and_gradients(f, *shapes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    out = f(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn_like(out))]


def softmax(shape, dtype, **options):
    return rows_and_gradients(lambda x: foveate.softmax(x, **options), shape, dtype=dtype)


def rms_norm(shape, dtype):
    return rows_and_gradients(lambda x, w: foveate.rms_norm(x, w, 1e-5), shape, shape[1:], dtype=dtype)


def cross_entropy(shape, dtype, **options):
    target = torch.randint(0, shape[1], shape[:1])
    return rows_and_gradients(
        lambda x: foveate.cross_entropy(x, target, reduction="none", **options), shape, dtype=dtype
    )


def decode(case):
    inputs = make_kv_inputs(case)
    results = [*inputs.run("native"), inputs.k_cache, inputs.v_cache]
    return results + [
        inputs.options[name] for name in ("k_scale", "v_scale") if isinstance(inputs.options[name], Tensor)
    ]


RUNS = {
    "softmax of a few lanes": lambda: softmax((70, 65), F32, causal=True),
    "softmax of a block": lambda: softmax((3, 3000), BF16),
    "softmax of a block, read twice": lambda: softmax((2, 17001), BF16),
    "rms_norm of a warp, whose teams add up dweight": lambda: rms_norm((70, 200), F16),
    "rms_norm of a block": lambda: rms_norm((5, 2300), F32),
    "rms_norm of a block, read twice": lambda: rms_norm((3, 9001), BF16),
    "cross_entropy of a warp": lambda: cross_entropy((9, 100), F16, label_smoothing=0.1),
    "cross_entropy of a block": lambda: cross_entropy((3, 9001), F32, label_smoothing=0.1, z_loss=0.01, softcap=5.0),
    "decode bf16": lambda: decode(KvCase(dtype=BF16, d=64, longest=300, rotary=16)),
    "decode fp32, paged, in splits": lambda: decode(
        KvCase(longest=300, page_size=8, hq=8, sq=5, num_splits=3, sinks=True)
    ),
    "decode fp16 of two slices, padded": lambda: decode(KvCase(dtype=F16, d=40, dv=264, longest=150, num_splits=2)),
    "decode bf16, stages used again": lambda: decode(KvCase(dtype=BF16, d=64, longest=300, num_splits=1)),
    "decode fp32, stages used again": lambda: decode(KvCase(d=48, longest=300, num_splits=1)),
    "decode int8, stages used again": lambda: decode(
        KvCase(dtype=BF16, storage=I8, d=64, longest=300, num_splits=1, page_size=16)
    ),
    "decode int8": lambda: decode(KvCase(dtype=BF16, storage=I8, longest=150, d=24, window=(100, -1))),
    "decode fp8 in splits": lambda: decode(KvCase(storage=F8, longest=150, page_size=16, num_splits=4, softcap=3.0)),
}


@functools.lru_cache
def round_robin(name: str) -> list[Tensor]:
    torch.manual_seed(0)
    return RUNS[name]()


@pytest.mark.parametrize(("schedule", "seed_of_it"), SCHEDULES)
@pytest.mark.parametrize("name", RUNS)
def test_every_schedule_gives_the_same_bits(name, schedule, seed_of_it, monkeypatch):
    expected = round_robin(name)
    assert not any(x.isnan().any() for x in expected if x.is_floating_point() and x.dtype != F8)
    monkeypatch.setenv("FOVEATE_EMULATOR_SCHEDULE", schedule)
    monkeypatch.setenv("FOVEATE_EMULATOR_SEED", str(seed_of_it))
    torch.manual_seed(0)
    for ours, theirs in zip(RUNS[name](), expected, strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def test_blocks_that_walk_over_tiles_of_the_bias():
    """Beyond 512 tiles a block adds up several, and copies the next over the last. The window leaves few of them to compute."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, 1400, 1, 32).to(BF16) for _ in range(3))
    bias = torch.randn(1, 1, 1, 1400).to(BF16).requires_grad_()

    def gradient(backend: str, dtype: torch.dtype) -> Tensor:
        out = foveate.attention(*(x.to(dtype) for x in (q, k, v)), bias=bias.to(dtype), window=(8, 8), backend=backend)
        return torch.autograd.grad(out, bias, torch.ones_like(out))[0]

    expected = gradient("reference", F32).float()
    torch.testing.assert_close(
        gradient("native", BF16).float(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item()
    )
