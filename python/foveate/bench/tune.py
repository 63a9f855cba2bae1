"""`foveate bench tune`: measures the candidate configs of the Triton attention kernels and writes the fastest into their table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import foveate
from foveate.backend import triton as triton_backend

Time = Callable[["Case", "list[torch.Tensor]"], float]  # milliseconds, inf where the kernel cannot be launched
_GAIN = 0.98  # of the time by the rules: what a config must be below to get into the table
_TOLERANCE = 2e-2


class Case(NamedTuple):
    kind: str  # as `config.key` has it
    D: int
    S: int


def cases() -> Iterator[Case]:
    """bf16, head dims 64, 128 and 256, short and long."""
    for kind in ("forward", "forward masked", "dq", "dkv"):
        for D in (64, 128, 256):
            yield from (Case(kind, D, 1024), Case(kind, D, 8192))


def candidates(kind: str, D: int, arch: int) -> list[Any]:
    """Configs beside the one that the rules give."""
    from foveate.backend.triton.config import DESCRIPTORS, SPECIALIZED, Config

    if kind in ("dq", "dkv"):
        blocks = [(128, 64), (64, 64), (64, 128), (128, 32), (32, 128), (32, 64)]
        return [Config(m, n, warps, 2) for m, n in blocks for warps in ((4, 8) if m * n > 2048 else (4,))]
    configs = [
        Config(128, 128, 8, 2),
        Config(128, 64, 8, 3),
        Config(128, 64, 4, 3),
        Config(64, 64, 4, 3),
        Config(128, 32, 8, 3),
    ]
    if arch // 10 == 9:
        configs += [Config(128, n, 8, stages, DESCRIPTORS) for n, stages in ((128, 2), (64, 3))]
        configs += [Config(128, n, 4, stages, SPECIALIZED) for n, stages in ((128, 2), (64, 2), (64, 3))]
    return configs


def tensors(case: Case, device: str) -> list[torch.Tensor]:
    """q, k, v and dout [B, S, H, D]: 16384 tokens of 2048 channels."""
    shape = (max(1, 16384 // case.S), case.S, 2048 // case.D, case.D)
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(4)]


def run(case: Case, inputs: list[torch.Tensor]) -> Callable[[], Any]:
    """What is timed: the forward pass, or the backward pass of one that has been."""
    q, k, v, dout = inputs
    if case.kind.startswith("forward"):
        return lambda: foveate.attention(q, k, v, causal=case.kind != "forward", backend="triton")
    leaves = [q.detach().requires_grad_()] if case.kind == "dq" else [x.detach().requires_grad_() for x in (k, v)]
    operands = (*leaves, k, v) if case.kind == "dq" else (q, *leaves)
    out = foveate.attention(*operands, causal=True, backend="triton")
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def milliseconds(case: Case, inputs: list[torch.Tensor]) -> float:
    import triton

    try:
        return float(triton.testing.do_bench(run(case, inputs), warmup=10, rep=50, return_mode="median"))
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError):
        return math.inf


def agrees(case: Case, inputs: list[torch.Tensor], expected: Any) -> bool:
    """Whether a config's result is that of the rules; one that cannot be launched is left to the timing."""
    try:
        results = run(case, inputs)()
    except Exception:  # whatever the compiler or the driver says of this config
        return True
    pairs = zip(results, expected) if isinstance(results, tuple) else [(results, expected)]
    return all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in pairs)


def tune(
    arch: int, device: str, *, time: Time, path: Path | None = None, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measures every case and rewrites the table at `path`; entries of other chips stay. Returns the table."""
    from foveate.backend.triton import config

    path = config.TABLE_PATH if path is None else path
    table = {
        name: entry for name, entry in config.read_table(path).items() if not name.startswith(f"{config.chip(arch)} ")
    }
    for case in cases():
        inputs = tensors(case, device)
        name = config.key(case.kind, case.D, torch.bfloat16, case.S, arch)
        with config.table_is({}):
            expected, rule = run(case, inputs)(), time(case, inputs)
        best, chosen = rule * _GAIN, None
        for candidate in candidates(case.kind, case.D, arch):
            with config.table_is({name: candidate}):
                taken = time(case, inputs) if agrees(case, inputs, expected) else math.inf
            if taken < best:
                best, chosen = taken, candidate
        if chosen is not None:
            table[name] = chosen
            config.write_table(table, path)
        log(
            f"{name:<40} {rule:8.3f} ms by the rules"
            + ("" if chosen is None else f", {best:8.3f} ms by {tuple(chosen)}")
        )
    config.write_table(table, path)
    return table


def main() -> None:
    """Raises RuntimeError without a GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            "tune measures kernels on a GPU, and torch sees none; run it on the machine whose GPU it is for"
        )
    reason = triton_backend.missing_reason()
    if reason is not None:
        raise RuntimeError(f"tune measures the Triton kernels, which cannot run here: {reason}")
    from foveate.backend.triton import attention_launch, config

    tune(attention_launch.arch(torch.device("cuda", torch.cuda.current_device())), "cuda", time=milliseconds)
    print(f"written to {config.TABLE_PATH}")
