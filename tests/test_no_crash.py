"""Whatever the compiled functions are given, they raise or answer: valid arguments with one or two of them replaced by something else.

Runs in a process of its own, because what it looks for is the death of the process.
"""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch

from foveate import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool)
NUMBERS = (0, 1, -1, 2, 3, 8, 2**31 - 1, 2**31, -(2**31), 2**40, 0.5, -0.5, float("nan"), float("inf"), True, None, "x")


def something(rng: random.Random, like: object) -> object:
    """Another value in place of `like`: of its kind most of the time."""
    if not isinstance(like, torch.Tensor) and rng.random() < 0.8:
        return rng.choice(NUMBERS)
    if isinstance(like, torch.Tensor) and rng.random() < 0.6:
        kind = rng.randrange(6)
        if kind == 0:
            return like.to(rng.choice(DTYPES))
        if kind == 1 and like.dim() > 1:
            return like.transpose(rng.randrange(like.dim()), rng.randrange(like.dim()))
        if kind == 2 and like.dim() > 0:
            return like.narrow(rng.randrange(like.dim()), 0, 0)
        if kind == 3 and like.dim() > 0:
            return torch.cat([like, like], dim=rng.randrange(like.dim()))
        if kind == 4:
            return like.unsqueeze(0)
        return like.to("meta")
    shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(6))]
    return rng.choice((None, torch.zeros(shape).to(rng.choice(DTYPES))))


def attention_arguments(rng: random.Random) -> tuple[list[object], list[object]]:
    B, Sq, Skv, Hkv, G, D = (rng.choice((0, 1, 2, 5, 19)) for _ in range(6))
    Hq = Hkv * G
    q, k, v = torch.randn(B, Sq, Hq, D), torch.randn(B, Skv, Hkv, D), torch.randn(B, Skv, Hkv, D)
    out, lse = torch.empty(B, Sq, Hq, D), torch.empty(B, Hq, Sq)
    table, buckets = torch.randn(4, Hq), torch.zeros(max(Sq + Skv - 1, 0), dtype=torch.int32)
    options = [
        torch.randn(B, 1, Sq, Skv), torch.ones(1, Hq, 1, Skv, dtype=torch.bool), torch.rand(1, Hq), table, buckets,
        torch.randn(Hq), torch.full((B,), Skv, dtype=torch.int64), None, None, torch.tensor([1, 2]),
        Sq, Skv, rng.random() < 0.5, rng.choice((-1, 3)), -1, 0.5, rng.choice((0.0, 2.0)), rng.choice((0.0, 0.5)), 2,
    ]  # fmt: skip
    for i in range(10):
        if rng.random() < 0.4:
            options[i] = None
    if options[3] is None or options[4] is None:
        options[3] = options[4] = None
    grads = [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]
    extra = [
        torch.empty(B, 1, Sq, Skv) if options[0] is not None else None,
        torch.empty_like(table) if options[3] is not None else None,
        torch.empty(Hq) if options[5] is not None else None,
    ]
    return [q, k, v, out, lse, *options], [torch.randn_like(out), None, q, k, v, out, lse, *grads, *extra, *options]


def cache_arguments(rng: random.Random) -> list[object]:
    B, Sq, Hkv, G, D, pages, size = (rng.choice((1, 2, 3)), rng.choice((0, 1, 4)), rng.choice((1, 2)), 2, 16, 6, 4)
    q, new = torch.randn(B, Sq, Hkv * G, D), torch.randn(B, 1, Hkv, D)
    cache = torch.zeros(pages, size, Hkv, D)
    table = torch.arange(pages, dtype=torch.int32)[:B, None].repeat(1, 2)
    return [
        q, cache, cache.clone(), new, new, torch.full((B,), 3), torch.empty(B, Sq, Hkv * G, D),
        torch.empty(B, Hkv * G, Sq), None, None, None, table, None, None, False, None, None, False, False, None, None,
        True, -1, -1, 0.25, 0.0, 1, 0, max(1, Sq * G), Hkv, False, 2,
    ]  # fmt: skip


def storm(seed: int, rounds: int) -> tuple[int, int]:
    """Calls that returned and calls that raised."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    C = _native._C
    returned = raised = 0
    for _ in range(rounds):
        forward, backward = attention_arguments(rng)
        cases = (
            (C.attention_forward, forward),
            (C.attention_backward, backward),
            (C.attention_with_kv_cache, cache_arguments(rng)),
        )
        for function, arguments in cases:
            for _ in range(rng.randrange(3)):
                i = rng.randrange(len(arguments))
                arguments[i] = something(rng, arguments[i])
            try:
                function(*arguments)
                returned += 1
            except (ValueError, TypeError, MemoryError, BufferError, RuntimeError):
                raised += 1
    return returned, raised


@pytest.mark.skipif(_native._C is None, reason="no compiled module")
@pytest.mark.parametrize("seed", [1, 2])
def test_compiled_functions_survive_anything(seed):
    done = subprocess.run([sys.executable, __file__, str(seed)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"python {__file__} {seed} died with {done.returncode}: {done.stderr[-2000:]}"
    returned, raised = map(int, done.stdout.split())
    assert returned > 500, "too few calls were valid for the others to be near misses"
    assert raised > 500


if __name__ == "__main__":
    print(*storm(int(sys.argv[1]), 1500))
