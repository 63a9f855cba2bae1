"""The Triton kernels compile for chips that are not here, and none spills more than what is listed."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

import foveate

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs triton without its interpreter", allow_module_level=True)

from aot import compiling

ARCHS = [80, 90, 100]
# Bytes of stack per thread by (kernel, arch, dtype, head dim), where they are not 0. A new one, or more bytes, is a slower kernel.
STACK: dict[tuple[str, int, str, int], int] = {}
HALF, SINGLE = torch.bfloat16, torch.float32
NAMES = {HALF: "bf16", SINGLE: "fp32"}


def tensors(dtype: torch.dtype, d: int, dv: int | None = None, rows: int = 256, heads: int = 2) -> tuple[torch.Tensor, ...]:
    q = torch.zeros(1, rows, heads, d, dtype=dtype, requires_grad=True)
    k, v = (torch.zeros(1, 256, 2, n, dtype=dtype, requires_grad=True) for n in (d, dv or d))
    return q, k, v


def check(found, arch: int, dtype: torch.dtype, d: int) -> None:
    for kernel in found:
        allowed = STACK.get((kernel.name, arch, NAMES[dtype], d), 0)
        assert kernel.stack <= allowed, f"{kernel} for sm_{arch}, {NAMES[dtype]}, head dim {d}: {allowed} bytes of stack are listed"
        assert kernel.shared <= (166912 if arch == 80 else 232448), f"{kernel} needs more shared memory than sm_{arch} has"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("dtype", "d"), [(HALF, 64), (HALF, 128), (HALF, 256), (SINGLE, 64), (SINGLE, 128), (SINGLE, 256)], ids=str)
def test_attention(arch, dtype, d, tmp_path):
    q, k, v = tensors(dtype, d)
    with compiling(arch, tmp_path) as found:
        foveate.attention(q, k, v, causal=True, backend="triton").sum().backward()
    assert [kernel.name for kernel in found] == ["attention_forward", "attention_rows", "attention_dq", "attention_dkv"]
    check(found, arch, dtype, d)
