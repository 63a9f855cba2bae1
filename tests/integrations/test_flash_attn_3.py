"""foveate.integrations.flash_attn_3: FlashAttention-3's own options, each against a loop over sequences in plain torch."""

from __future__ import annotations

import pytest
import torch

from foveate.integrations import flash_attn_3

B, HQ, HKV, D = 3, 4, 2, 16
near = torch.testing.assert_close


def plain(q, k, v, *, qv=None, causal=False, chunk=0, scale=None):
    """[Sq, Hq, D], [Sk, Hkv, D], [Sk, Hkv, Dv] -> [Sq, Hq, Dv]."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k)
    width = q.shape[-1]
    if qv is not None:
        scores, width = scores + torch.einsum("ihd,jhd->hij", qv, v), width + v.shape[-1]
    scores = scores * (width**-0.5 if scale is None else scale)
    place = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    key = torch.arange(k.shape[0])
    hidden = (key > place) if causal else torch.zeros(place.shape[0], key.shape[0], dtype=torch.bool)
    if chunk:
        hidden = hidden | (place.div(chunk, rounding_mode="floor") != key // chunk)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("hij,jhd->ihd", weights, v)


def tensors(Sq=7, Sk=11, Dv=D):
    return torch.randn(B, Sq, HQ, D), torch.randn(B, Sk, HKV, D), torch.randn(B, Sk, HKV, Dv)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("with_qv", [False, True])
def test_dense(causal, chunk, with_qv):
    q, k, v = (x.requires_grad_() for x in tensors(Dv=24))
    qv = torch.randn(B, 7, HQ, 24, requires_grad=True) if with_qv else None
    out, lse = flash_attn_3.flash_attn_func(
        q, k, v, causal=causal, qv=qv, attention_chunk=chunk, return_attn_probs=True
    )
    expected = torch.stack(
        [plain(q[b], k[b], v[b], qv=None if qv is None else qv[b], causal=causal, chunk=chunk) for b in range(B)]
    )
    near(out, expected, rtol=1e-5, atol=1e-5)
    assert lse.shape == (B, HQ, 7)
    inputs = [x for x in (q, k, v, qv) if x is not None]
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), inputs) for x in (out, expected))):
        near(a, b, rtol=1e-4, atol=1e-5)


def test_descales_and_float8():
    q, k, v = tensors()
    factors = [torch.rand(B, HKV) + 0.5 for _ in range(3)]
    of_q = factors[0].repeat_interleave(2, 1)
    expected = [(x * f[:, None, :, None]) for x, f in zip((q, k, v), (of_q, *factors[1:]))]
    out = flash_attn_3.flash_attn_func(q, k, v, None, True, None, *factors)
    near(out, flash_attn_3.flash_attn_func(*expected, causal=True), rtol=1e-5, atol=1e-5)
    small = [x.to(torch.float8_e4m3fn) for x in (q, k, v)]
    out = flash_attn_3.flash_attn_func(*small, None, True, None, *factors)
    assert out.dtype is torch.bfloat16
    exact = [(x.float() * f[:, None, :, None]) for x, f in zip(small, (of_q, *factors[1:]))]
    near(out.float(), flash_attn_3.flash_attn_func(*exact, causal=True), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("used", [False, True])
def test_varlen(chunk, used):
    lens_q, lens_k = [5, 1, 7], [9, 4, 7]
    cu_q, cu_k = torch.tensor([0, 5, 6, 13]).int(), torch.tensor([0, 9, 13, 20]).int()
    q, k, v = (torch.randn(n, h, D, requires_grad=True) for n, h in ((13, HQ), (20, HKV), (20, HKV)))
    more = {}
    if used:
        lens_q, lens_k = [3, 0, 7], [6, 4, 5]
        more = {"seqused_q": torch.tensor(lens_q).int(), "seqused_k": torch.tensor(lens_k).int()}
    out, lse = flash_attn_3.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 7, 9, causal=True, attention_chunk=chunk, return_attn_probs=True, **more
    )
    expected = torch.zeros(13, HQ, D)
    for b, (n, m) in enumerate(zip(lens_q, lens_k)):
        of_q, of_k = slice(int(cu_q[b]), int(cu_q[b]) + n), slice(int(cu_k[b]), int(cu_k[b]) + m)
        expected[of_q] = plain(q[of_q], k[of_k], v[of_k], causal=True, chunk=chunk)
    near(out, expected, rtol=1e-5, atol=1e-5)
    assert lse.shape == (HQ, 13)
    for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (out, expected))):
        near(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["dense", "rows", "pages", "rows of pages", "leftpad"])
@pytest.mark.parametrize("odd", ["packed", "qv", "chunk", "descale", "rotary_seqlens"])
def test_kv_cache(memory, odd):
    """New keys of each sequence appended, packed or not, then attention to the sequence alone."""
    lens, new = [3, 6, 0], [2, 2, 2]
    left = [1, 2, 0] if memory == "leftpad" else [0, 0, 0]
    rows = [4, 0, 2] if memory in ("rows", "pages", "rows of pages") else [0, 1, 2]
    keys, values = (torch.randn(5 if memory in ("rows", "pages", "rows of pages") else B, 12, HKV, D) for _ in range(2))
    caches = [x.clone().reshape(15, 4, HKV, D) if "pages" in memory else x.clone() for x in (keys, values)]
    where = {
        "rows": {"cache_batch_idx": torch.tensor(rows).int()},
        "pages": {"page_table": (torch.tensor(rows)[:, None] * 3 + torch.arange(3)).int()},
        "rows of pages": {
            "cache_batch_idx": torch.tensor(rows).int(),
            "page_table": (torch.arange(5)[:, None] * 3 + torch.arange(3)).int(),
        },
        "leftpad": {"cache_leftpad": torch.tensor(left).int()},
    }.get(memory, {})
    q, k, v = torch.randn(B, 2, HQ, D), torch.randn(B, 2, HKV, D), torch.randn(B, 2, HKV, D)
    options = {"causal": True, "cache_seqlens": torch.tensor(lens).int(), **where}
    lens_q, chunk, qv, factors = [2, 2, 2], 0, None, None
    arguments = [q, *caches, k, v]
    if odd == "packed":
        lens_q, new = [1, 2, 0], [2, 0, 1]
        arguments = [torch.cat([q[b, :n] for b, n in enumerate(lens_q)]), *caches]
        arguments += [torch.cat([x[b, :n] for b, n in enumerate(new)]) for x in (k, v)]
        options |= {"cu_seqlens_q": torch.tensor([0, 1, 3, 3]).int(), "max_seqlen_q": 2}
        options |= {"cu_seqlens_k_new": torch.tensor([0, 2, 2, 3]).int()}
    elif odd == "qv":
        qv = options["qv"] = torch.randn(B, 2, HQ, D)
    elif odd == "chunk":
        chunk = options["attention_chunk"] = 3
    elif odd == "descale":
        factors = [torch.rand(B, HKV) + 0.5 for _ in range(3)]
        options |= dict(zip(("q_descale", "k_descale", "v_descale"), factors))
    else:
        angles = torch.rand(12, 4) * 6
        options |= {
            "rotary_cos": angles.cos(),
            "rotary_sin": angles.sin(),
            "rotary_seqlens": torch.tensor([1, 0, 5]).int(),
        }
        options["rotary_interleaved"] = False
        from test_flash_attn_surface import turned

        for x in (q, k):
            for b, start in enumerate([1, 0, 5]):
                arguments[0 if x is q else 3] = arguments[0 if x is q else 3].clone()
                x[b] = turned(x[b], angles, start + torch.arange(2), False)
    out, lse = flash_attn_3.flash_attn_with_kvcache(*arguments, return_softmax_lse=True, **options)
    expected = []
    for b in range(B):
        keys[rows[b], lens[b] : lens[b] + new[b]], values[rows[b], lens[b] : lens[b] + new[b]] = (
            k[b, : new[b]],
            v[b, : new[b]],
        )
        span = slice(left[b], lens[b] + new[b])
        own = [q[b, : lens_q[b]], keys[rows[b], span], values[rows[b], span]]
        if factors is not None:
            own = [x * f[b].repeat_interleave(x.shape[1] // HKV)[:, None] for x, f in zip(own, factors)]
        expected.append(plain(*own, qv=None if qv is None else qv[b], causal=True, chunk=chunk))
    near(out, torch.cat(expected) if odd == "packed" else torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert lse.shape == ((HQ, 3) if odd == "packed" else (B, HQ, 2))
    near(caches[0].view_as(keys), keys, rtol=1e-5, atol=1e-5)
    assert torch.equal(caches[1].view_as(values), values)


def test_a_float8_cache():
    q, k, v = (torch.randn(B, n, h, D).to(torch.float8_e4m3fn) for n, h in ((2, HQ), (9, HKV), (9, HKV)))
    lens = torch.tensor([9, 3, 6]).int()
    factors = [torch.rand(B, HKV) + 0.5 for _ in range(3)]
    for given in (None, factors):
        names = {} if given is None else dict(zip(("q_descale", "k_descale", "v_descale"), given))
        out = flash_attn_3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, causal=True, **names)
        own = [x.float() for x in (q, k, v)]
        if given is not None:
            own = [x * f.repeat_interleave(x.shape[2] // HKV, 1)[:, None, :, None] for x, f in zip(own, given)]
        expected = torch.stack(
            [plain(own[0][b], own[1][b, : lens[b]], own[2][b, : lens[b]], causal=True) for b in range(B)]
        )
        assert out.dtype is torch.bfloat16
        near(out.float(), expected, rtol=3e-2, atol=3e-2)


def test_combine():
    q, k, v = tensors()
    parts = [
        flash_attn_3.flash_attn_func(q, k[:, s], v[:, s], return_attn_probs=True) for s in (slice(4), slice(4, 11))
    ]
    outs, lses = torch.stack([p[0] for p in parts]), torch.stack([p[1].transpose(1, 2) for p in parts])
    out, lse = flash_attn_3.flash_attn_combine(outs, lses)
    expected, expected_lse = flash_attn_3.flash_attn_func(q, k, v, return_attn_probs=True)
    near(out, expected, rtol=1e-5, atol=1e-5)
    near(lse, expected_lse.transpose(1, 2), rtol=1e-5, atol=1e-5)
    empty, empty_lse = flash_attn_3.flash_attn_combine(torch.zeros_like(outs), torch.full_like(lses, float("-inf")))
    assert torch.equal(empty, torch.zeros_like(empty)) and bool(empty_lse.isneginf().all())
