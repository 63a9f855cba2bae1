"""CacheView: lengths, positions and attention of one step are those of the cache behind it."""

import pytest
import torch

import foveate


def test_a_view_has_the_lengths_before_the_step_and_attends_like_the_cache():
    torch.manual_seed(0)
    cache = foveate.PagedKVCache(8, 4, num_kv_heads=2, head_dim=16, num_layers=2, dtype=torch.float32)
    a, b = cache.create(), cache.create()
    cache.append([a], 5)
    cache.attend(1, *torch.randn(3, 1, 5, 2, 16), seqs=[a])
    cache.append([b, a], 2)
    view = foveate.CacheView(cache, [b, a], 2)
    assert view.lens.tolist() == [0, 5]
    assert view.positions().tolist() == [[0, 1], [5, 6]]
    q, k, v = torch.randn(3, 2, 2, 2, 16)
    out = view.attend(1, q, k, v, window=(3, 0))
    torch.testing.assert_close(out, cache.attend(1, q, seqs=[b, a], window=(3, 0)), rtol=0, atol=0)


def test_a_view_of_an_unknown_sequence_is_refused():
    cache = foveate.PagedKVCache(8, 4, num_kv_heads=2, head_dim=16)
    with pytest.raises(ValueError, match="3 is not a sequence of this cache"):
        foveate.CacheView(cache, [3], 1)
