"""PagedKVCache against a dict of Python lists: random operations, copy-on-write, sharing, a full cache, storage dtypes."""

from __future__ import annotations

import collections
import random

import pytest
import torch

import foveate

pytestmark = [pytest.mark.sanitize, pytest.mark.cuda]

HKV, D, DV, LAYERS = 2, 16, 8, 2


def make_cache(num_pages=12, page_size=4, dtype=torch.float32):
    cache = foveate.PagedKVCache(
        num_pages, page_size, num_kv_heads=HKV, head_dim=D, head_dim_v=DV, num_layers=LAYERS, dtype=dtype
    )
    if dtype.is_floating_point and dtype != torch.float8_e4m3fn:  # poison: nothing may come from unused memory
        cache.k_pages.fill_(float("nan")), cache.v_pages.fill_(float("nan"))
    if cache.k_scale is not None:
        cache.k_scale.fill_(float("nan")), cache.v_scale.fill_(float("nan"))
    return cache


def rows(B, S, dtype=torch.float32):
    return (
        torch.randn(B, S, 2 * HKV, D).to(dtype),
        torch.randn(B, S, HKV, D).to(dtype),
        torch.randn(B, S, HKV, DV).to(dtype),
    )


def check_references(cache):
    """Every page is free, or referenced exactly as often as sequences hold it."""
    held = [page for pages in cache._pages.values() for page in pages]
    assert [held.count(page) for page in range(len(cache._references))] == cache._references
    assert sorted(cache._free) == [page for page, count in enumerate(cache._references) if count == 0]


def random_operations(seed):
    """Each sequence's model is its own K and V per layer; attend must equal attention over them, and no reference may leak.

    Returns how often each branch ran."""
    rng, ran = random.Random(seed), collections.Counter()
    cache, model = make_cache(num_pages=10, page_size=rng.choice([1, 3, 4])), {}
    for _ in range(60):
        action = rng.choice(["create", "append", "append", "append", "fork", "truncate", "free"])
        if action == "create" or not model:
            model[cache.create()] = [(torch.empty(0, HKV, D), torch.empty(0, HKV, DV)) for _ in range(LAYERS)]
            continue
        seq = rng.choice(list(model))
        if action == "append":
            seqs, n = rng.sample(list(model), rng.randint(1, min(3, len(model)))), rng.randint(1, 4)
            before = cache.stats(), {s: (list(cache._pages[s]), cache.length(s)) for s in model}
            try:
                cache.append(seqs, n)
            except foveate.CacheFull:
                ran["full"] += 1
                assert before == (cache.stats(), {s: (list(cache._pages[s]), cache.length(s)) for s in model})
                check_references(cache)
                cache.free(seq), model.pop(seq)
                continue
            for layer in range(LAYERS):
                q, k, v = rows(len(seqs), n)
                out = cache.attend(layer, q, k, v, seqs=seqs)
                for b, s in enumerate(seqs):
                    keys, values = model[s][layer]
                    model[s][layer] = torch.cat([keys, k[b]]), torch.cat([values, v[b]])
                    expected = foveate.attention(
                        q[b : b + 1], *(x[None] for x in model[s][layer]), causal=True, backend="reference"
                    )
                    torch.testing.assert_close(out[b : b + 1], expected)
        elif action == "fork":
            length = rng.randint(0, cache.length(seq))
            model[cache.fork(seq, length)] = [(k[:length], v[:length]) for k, v in model[seq]]
        elif action == "truncate":
            length = rng.randint(0, cache.length(seq))
            cache.truncate(seq, length)
            model[seq] = [(k[:length], v[:length]) for k, v in model[seq]]
        else:
            cache.free(seq), model.pop(seq)
        ran[action] += 1
        ran["shared"] += cache.stats().shared_pages > 0
        assert {s: cache.length(s) for s in model} == {s: len(model[s][0][0]) for s in model}
        check_references(cache)
    for seq in list(model):
        cache.free(seq)
    assert cache.stats().free_pages == 10 and len(cache) == 0
    check_references(cache)
    return ran


def test_random_operations_match_a_dict(seed):
    ran = collections.Counter()
    for index in range(6):
        ran += random_operations(1000 * seed + index)
    assert min(ran[name] for name in ("append", "fork", "truncate", "free", "full", "shared")) >= 5, ran


def test_full_cache_says_what_is_missing_and_stays_as_it_was():
    cache = make_cache(num_pages=2, page_size=4)
    seq = cache.create()
    cache.append([seq], 8)
    other = cache.create()
    with pytest.raises(
        foveate.CacheFull, match=r"appending 1 tokens to 1 sequences needs 1 pages of 4 tokens, 0 of 2 are free"
    ):
        cache.append([other])
    assert cache.length(other) == 0 and cache.length(seq) == 8
    cache.free(seq)
    cache.append([other])


def test_append_to_several_is_all_or_nothing():
    cache = make_cache(num_pages=3, page_size=4)
    a, b = cache.create(), cache.create()
    cache.append([a], 8)
    with pytest.raises(foveate.CacheFull, match="needs 2 pages of 4 tokens, 1 of 3 are free"):
        cache.append([a, b], 1)
    assert cache.length(a) == 8 and cache.length(b) == 0 and cache.stats().free_pages == 1


def test_fork_copies_only_the_last_page_and_only_once():
    cache = make_cache(num_pages=8, page_size=4)
    parent = cache.create()
    cache.append([parent], 6)
    q, k, v = rows(1, 6)
    cache.attend(0, q, k, v, seqs=[parent])
    child = cache.fork(parent)
    assert cache.stats().used_pages == 2 and cache.stats().shared_pages == 2
    cache.append([parent, child], 1)  # one of the two takes a copy, the other keeps the page
    assert cache.stats().used_pages == 3 and cache.stats().shared_pages == 1
    q, k1, v1 = rows(2, 1)
    out = cache.attend(0, q, k1, v1, seqs=[parent, child])
    for b in range(2):
        expected = foveate.attention(
            q[b : b + 1],
            torch.cat([k, k1[b : b + 1]], 1),
            torch.cat([v, v1[b : b + 1]], 1),
            causal=True,
            backend="reference",
        )
        torch.testing.assert_close(out[b : b + 1], expected)


def test_fork_needs_a_page_for_its_copy():
    cache = make_cache(num_pages=1, page_size=4)
    parent = cache.create()
    cache.append([parent], 2)
    child = cache.fork(parent)
    with pytest.raises(foveate.CacheFull, match="needs 1 pages"):
        cache.append([child])
    with pytest.raises(foveate.CacheFull, match="needs 1 pages"):
        cache.append([parent, child])
    cache.free(parent)
    cache.append([child])  # the page is its own now


def test_prefix_of_whole_pages_is_shared_without_copies():
    cache = make_cache(num_pages=6, page_size=4)
    parent = cache.create()
    cache.append([parent], 10)
    children = [cache.fork(parent, 8) for _ in range(3)]
    assert cache.stats().used_pages == 3
    cache.append(children, 1)
    assert cache.stats().used_pages == 6 and cache.stats().shared_pages == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_storage_dtypes(dtype):
    """Prefill, fork, decode: as the dense cache of the same dtype, scales included in the copied page."""
    cache, q_dtype = make_cache(dtype=dtype), dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    seq = cache.create()
    cache.append([seq], 6)
    q, k, v = rows(1, 6, q_dtype)
    cache.attend(1, q, k, v, seqs=[seq])
    child = cache.fork(seq)
    cache.append([child], 1)
    q1, k1, v1 = rows(1, 1, q_dtype)
    out = cache.attend(1, q1, k1, v1, seqs=[child])
    dense_k, dense_v = torch.zeros(1, 8, HKV, D).to(dtype), torch.zeros(1, 8, HKV, DV).to(dtype)
    scales = {}
    if cache.k_scale is not None:
        scales = {"k_scale": torch.zeros(1, 8, HKV), "v_scale": torch.zeros(1, 8, HKV)}
    new = {"k": torch.cat([k, k1], 1), "v": torch.cat([v, v1], 1), "kv_lens": torch.tensor([0])}
    expected = foveate.attention_with_kv_cache(torch.cat([q, q1], 1), dense_k, dense_v, **new, **scales)
    torch.testing.assert_close(out[:, 0], expected[:, -1])


def test_tables():
    cache = make_cache(num_pages=6, page_size=4)
    a, b = cache.create(), cache.create()
    cache.append([a], 5), cache.append([b], 1)
    assert cache.block_table([b, a]).tolist() == [[2, -1], [0, 1]] and cache.block_table([b, a]).dtype == torch.int32
    assert cache.kv_lens([b, a]).tolist() == [1, 5]
    cache.truncate(a, 3)
    assert cache.block_table([b, a]).tolist() == [[2], [0]] and cache.kv_lens([a]).tolist() == [3]
    assert cache.block_table([]).shape == (0, 0)
    assert cache.stats() == (2, 4, 6, 2, 4, 0, 4 * LAYERS * 6 * 4 * HKV * (D + DV))
    assert a in cache and 99 not in cache


def bad_attend(cache, seq):
    q, k, v = rows(1, 2)
    cache.attend(0, q, k, v, seqs=[seq])


def shared_attend(cache, seq):
    cache.append([seq], 2)
    cache.fork(seq)
    bad_attend(cache, seq)


BAD = [
    (lambda c, s: c.append([s, s]), "is given twice"),
    (lambda c, s: c.append([s], -1), "n=-1 tokens cannot be appended; truncate"),
    (lambda c, s: c.append([s + 1]), "is not a sequence of this cache"),
    (lambda c, s: c.free(s) or c.length(s), "never created, or freed"),
    (lambda c, s: c.truncate(s, 1), "length=1 must be between 0 and the 0 tokens"),
    (lambda c, s: c.fork(s, 5), "length=5 to share must be between 0 and the 0 tokens"),
    (lambda c, s: c.attend(9, None, seqs=[s]), "layer=9 is not one of the cache's 2 layers"),
    (bad_attend, r"k has 2 new tokens, but sequence 0 has room for 0; call append\(seqs, 2\) first"),
    (shared_attend, "are shared with another sequence and cannot be written"),
    (lambda c, s: make_cache(num_pages=0), "num_pages=0 must be 1 or more"),
    (lambda c, s: make_cache(dtype=torch.int32), "dtype=torch.int32 cannot be stored"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_input(call, sentence):
    cache = make_cache()
    with pytest.raises(ValueError, match=sentence):
        call(cache, cache.create())


def test_a_held_page_outlives_its_sequence_and_starts_another():
    cache = make_cache(num_pages=4, page_size=4)
    first = cache.create()
    cache.append([first], 6)
    q, k, v = rows(1, 6)
    cache.attend(1, q, k, v, seqs=[first])
    full = cache.pages(first)[0]
    cache.hold(full)
    assert cache.references(full) == 2
    cache.free(first)
    assert cache.references(full) == 1 and cache.free_pages == 3 and cache.num_pages == 4
    second = cache.create_from_pages([full])
    assert cache.length(second) == 4
    cache.append([second], 1)
    q, k_new, v_new = rows(1, 1)
    out = cache.attend(1, q, k_new, v_new, seqs=[second])
    keys, values = torch.cat([k[:, :4], k_new], 1), torch.cat([v[:, :4], v_new], 1)
    torch.testing.assert_close(out, foveate.attention(q, keys, values, causal=True, backend="reference"))
    cache.release(full)
    assert cache.references(full) == 1
    cache.free(second)
    assert cache.references(full) == 0 and cache.free_pages == 4
    check_references(cache)


def test_a_page_that_is_not_in_use_cannot_be_held():
    cache = make_cache(num_pages=4, page_size=4)
    for action in (cache.hold, cache.release, lambda page: cache.create_from_pages([page])):
        for page in (2, -1, 4):
            with pytest.raises(ValueError, match=f"page {page} is not in use"):
                action(page)
    assert cache.stats().free_pages == 4 and len(cache) == 0


def test_a_full_cache_says_how_many_pages_are_missing():
    cache = make_cache(num_pages=4, page_size=4)
    with pytest.raises(foveate.CacheFull) as caught:
        cache.append([cache.create()], 25)
    assert caught.value.missing == 3


def test_tables_that_grow_step_by_step_are_those_made_at_once():
    rng, cache = random.Random(0), make_cache(num_pages=60, page_size=3)
    seqs = [cache.create() for _ in range(3)]
    views = []
    for i, seq in enumerate(seqs):
        cache.append([seq], 1 + 4 * i)
    for _ in range(12):
        cache.append(seqs, rng.randint(1, 4))
        views.append((cache.block_table(seqs), cache.kv_lens(seqs)))
        copies = [x.clone() for x in views[-1]]
        cache._tables = None
        assert torch.equal(views[-1][0], cache.block_table(seqs)) and torch.equal(views[-1][1], cache.kv_lens(seqs))
        cache._tables = tuple(seqs), *views[-1]
        views[-1] = (*views[-1], *copies)
    for table, lens, table_then, lens_then in views:
        assert torch.equal(table, table_then) and torch.equal(lens, lens_then), "what was given out stays as it was"
