"""The helper that runs ranks: a rank that fails or hangs fails the test with its own words, and no process stays."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from ranks import needs_gloo, run_ranks

pytestmark = needs_gloo


def rank_fine(rank: int, offset: int) -> torch.Tensor:
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return total


def rank_fails(rank: int, folder) -> None:
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    if rank == 1:
        raise ValueError("this rank has had enough")
    dist.barrier()
    time.sleep(60)


def rank_hangs(rank: int) -> None:
    if rank == 0:
        dist.barrier()
    time.sleep(60)


def test_results_of_every_rank(tmp_path):
    assert run_ranks(rank_fine, 2, tmp_path, 10) == [torch.tensor(21)] * 2


def test_a_rank_that_fails(tmp_path):
    start = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 ended with 1\n[\\s\\S]*ValueError: this rank has had enough"):
        run_ranks(rank_fails, 2, tmp_path, tmp_path)
    assert time.monotonic() - start < 30
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


def test_a_rank_that_hangs(tmp_path):
    with pytest.raises(AssertionError, match="Timeout[\\s\\S]*in rank_hangs"):
        run_ranks(rank_hangs, 2, tmp_path, timeout=2)
