"""Which way a call of the Triton kernels goes: heads packed into one program, blocks of keys that are skipped, no measuring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import foveate

if foveate.backends()["triton"] is not None:
    pytest.skip(f"triton: {foveate.backends()['triton']}", allow_module_level=True)

from foveate.backend.triton import attention_launch as launches

pytestmark = [pytest.mark.interpreted, pytest.mark.triton]


@pytest.fixture
def groups(monkeypatch):
    """The GROUP of each launch of the forward kernel: the query heads that are rows of one program."""
    found, kernel = [], launches.attention_forward

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **constants: (found.append(constants["GROUP"]), kernel[grid](*args, **constants))

    monkeypatch.setattr(launches, "attention_forward", Spy())
    return found


@pytest.mark.parametrize(("queries", "heads", "expected"), [(1, 8, 4), (3, 8, 4), (20, 8, 4), (128, 8, 1), (3, 2, 1)])
def test_heads_that_share_keys_are_packed_for_short_queries(queries, heads, expected, groups, device):
    q, k, v = (torch.randn(2, n, h, 32, device=device) for n, h in ((queries, heads), (130, 2), (130, 2)))
    out = foveate.attention(q, k, v, causal=True, backend="triton")
    assert groups == [expected]
    torch.testing.assert_close(out, foveate.attention(q, k, v, causal=True, backend="reference"), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backward", [False, True])
def test_blocks_that_no_query_sees_are_not_read(backward, device):
    """NaN in values beyond the diagonal would come through a weight of 0."""
    q, k, v = (torch.randn(1, 384, 1, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    k[:, 128:], v[:, 128:] = torch.nan, torch.nan
    q.requires_grad_(backward)
    out = foveate.attention(q, k, v, causal=True, backend="triton")[:, :128]
    assert out.isfinite().all()
    if backward:
        out.sum().backward()
        assert q.grad[:, :128].isfinite().all()
    q, k, v = (torch.randn(1, 384, 1, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    k[:, :128], v[:, :128] = torch.nan, torch.nan
    assert foveate.attention(q, k, v, window=(0, 0), backend="triton")[:, 256:].isfinite().all()


def test_nothing_is_measured_at_run_time():
    for file in Path(launches.__file__).parent.glob("*.py"):
        assert "autotune(" not in file.read_text(), file
