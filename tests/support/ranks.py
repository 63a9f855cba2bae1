"""Runs a function in several processes that form a gloo group: a rank that fails or hangs fails the test, and none is left behind."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch is built without gloo"
)


needs_fsdp = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 runs on the CPU from torch 2.7 on"
)

# A module that is missing here is left out; the rank that needs it says so.
_PRELOADED = [
    "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch._dynamo", "foveate.train", "foveate.ring", "compare",
    "tokenizers", "safetensors.torch", "matplotlib.figure",
]  # fmt: skip


def run_ranks(function: Callable[..., Any], size: int, folder: Path, *args: Any, timeout: float = 180) -> list[Any]:
    """[function(rank, *args) for each rank], each in its own process of one thread, with torch.distributed initialised.

    `function` is importable (of a test module) and returns what torch.load takes with weights_only. Raises the first failing rank's
    traceback; past `timeout` seconds, where every rank stood.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # One clean process that has imported torch, from which the ranks are forked: seconds less for each.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ranks = [context.Process(target=_rank, args=(function, rank, size, folder, args, timeout)) for rank in range(size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + timeout + 5
    try:
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                time.sleep(0.5)  # the others may be about to say what is wrong with them, too
                break
            time.sleep(0.01)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    if any(process.exitcode for process in ranks):
        notes = [f"rank {r} ended with {p.exitcode}\n{_note(folder, r)}" for r, p in enumerate(ranks) if p.exitcode]
        raise AssertionError("\n".join(notes))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _note(folder: Path, rank: int) -> str:
    path = folder / f"{rank}.txt"
    return path.read_text() if path.exists() else ""


def _rank(
    function: Callable[..., Any], rank: int, size: int, folder: Path, args: tuple[Any, ...], timeout: float
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # for what the rank starts; its own pool is set below
    torch.set_num_threads(1)
    with open(folder / f"{rank}.txt", "w") as note:
        faulthandler.dump_traceback_later(timeout, exit=True, file=note)
        try:
            # a file, not a port: two test processes never take the same one
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout),
            )
            torch.save(function(rank, *args), folder / f"{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=note)
            note.flush()
            os._exit(1)  # without waiting for the group
        finally:
            faulthandler.cancel_dump_traceback_later()
