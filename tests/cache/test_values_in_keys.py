"""A cache whose values lie within its keys, as latent attention has them, against one that holds both."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import foveate

SIZES: dict[str, Any] = {"num_kv_heads": 1, "head_dim": 40, "head_dim_v": 32, "num_layers": 2}


def steps(cache: foveate.PagedKVCache, seq: int, lengths: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """What 4 query heads see, step by step, on the last layer."""
    generator = torch.Generator().manual_seed(seed)
    cos, sin = torch.rand(2, 64, 4, generator=generator)
    out = []
    for n in lengths:
        cache.append([seq], n)
        q, k = torch.randn(1, n, 4, 40, generator=generator), torch.randn(1, n, 1, 40, generator=generator)
        for layer in range(2):
            seen = cache.attend(layer, q, k, k[..., 8:], seqs=[seq], causal=True, rotary_cos=cos, rotary_sin=sin)
        out.append(seen)
    return torch.cat(out, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_equals_a_cache_that_holds_both(dtype: torch.dtype) -> None:
    both = foveate.PagedKVCache(12, 4, dtype=dtype, **SIZES)
    within = foveate.PagedKVCache(12, 4, dtype=dtype, values_in_keys=True, **SIZES)
    seqs = both.create(), within.create()
    expected, got = steps(both, seqs[0], (9, 1, 3)), steps(within, seqs[1], (9, 1, 3))
    assert torch.equal(got, expected)
    # a fork gets a last page of its own
    forks = both.fork(seqs[0]), within.fork(seqs[1])
    assert torch.equal(steps(within, forks[1], (2,), 1), steps(both, forks[0], (2,), 1))
    assert torch.equal(steps(within, seqs[1], (1,), 2), steps(both, seqs[0], (1,), 2))


def test_memory_is_that_of_the_keys() -> None:
    cache = foveate.PagedKVCache(12, 4, dtype=torch.bfloat16, values_in_keys=True, **SIZES)
    assert cache.stats().nbytes == 2 * 12 * 4 * 40 * 2
    for other in (cache, cache.fresh(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        other.k_pages.fill_(3.0)
        assert (other.v_pages == 3.0).all() and other.v_pages.shape[-1] == 32
    quantized = foveate.PagedKVCache(12, 4, dtype=torch.int8, values_in_keys=True, **SIZES)
    assert quantized.stats().nbytes == 2 * 12 * 4 * (40 + 32 + 2 * 4)  # and two scales


def test_more_values_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="head_dim_v=48 is more than the head_dim=40"):
        foveate.PagedKVCache(4, num_kv_heads=1, head_dim=40, head_dim_v=48, values_in_keys=True)
