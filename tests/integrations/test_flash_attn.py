"""foveate.integrations.flash_attn: flash_attn's names and meaning, against torch's SDPA with the mask written out."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from foveate.integrations import flash_attn
from foveate.integrations.flash_attn.bert_padding import pad_input, unpad_input

TAIL = [
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "alibi_slopes",
    "deterministic",
    "return_attn_probs",
]
VARLEN = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
KVCACHE = ["q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx", "cache_leftpad",
           "block_table", "softmax_scale", "causal", "window_size", "softcap", "rotary_interleaved", "alibi_slopes", "num_splits",
           "return_softmax_lse"]  # fmt: skip


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    alibi: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, S, H, D] attention by torch, with flash_attn's bottom-right masks and ALiBi written out as a float mask."""
    Sq, Sk = q.shape[1], k.shape[1]
    distance = torch.arange(Sk)[None, :] - torch.arange(Sq)[:, None] - (Sk - Sq)
    keep = torch.ones(Sq, Sk, dtype=torch.bool)
    if causal:
        keep &= distance <= 0
    if window[0] >= 0:
        keep &= distance >= -window[0]
    if window[1] >= 0:
        keep &= distance <= window[1]
    mask = torch.where(keep, 0.0, float("-inf")).to(q.dtype)
    if alibi is not None:
        mask = mask - alibi[..., None, None] * distance.abs()
    out = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def assert_near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_parameter_names_and_order_are_those_of_flash_attn() -> None:
    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(flash_attn.flash_attn_func) == ["q", "k", "v", *TAIL]
    assert names(flash_attn.flash_attn_kvpacked_func) == ["q", "kv", *TAIL]
    assert names(flash_attn.flash_attn_qkvpacked_func) == ["qkv", *TAIL]
    assert names(flash_attn.flash_attn_varlen_func) == ["q", "k", "v", *VARLEN, *TAIL, "block_table"]
    assert names(flash_attn.flash_attn_varlen_kvpacked_func) == ["q", "kv", *VARLEN, *TAIL]
    assert names(flash_attn.flash_attn_varlen_qkvpacked_func) == ["qkv", "cu_seqlens", "max_seqlen", *TAIL]
    assert names(flash_attn.flash_attn_with_kvcache) == KVCACHE
    assert inspect.signature(flash_attn.flash_attn_with_kvcache).parameters["rotary_interleaved"].default is True
    assert inspect.signature(flash_attn.flash_attn_with_kvcache).parameters["causal"].default is False


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"causal": True}, {"causal": True}),
        ({"window_size": (2, 1)}, {"window": (2, 1)}),
        ({"causal": True, "window_size": (3, -1)}, {"causal": True, "window": (3, -1)}),
        ({"softmax_scale": 0.3}, {"scale": 0.3}),
    ],
)
@pytest.mark.parametrize(("Sq", "Sk"), [(9, 9), (5, 12), (1, 7)])
def test_forward_and_backward(ours: dict[str, Any], theirs: dict[str, Any], Sq: int, Sk: int) -> None:
    q, k, v = randn(2, Sq, 4, 16, grad=True), randn(2, Sk, 2, 16, grad=True), randn(2, Sk, 2, 16, grad=True)
    out, expected = flash_attn.flash_attn_func(q, k, v, **ours), sdpa(q, k, v, **theirs)
    assert_near(out, expected)
    weights = torch.randn_like(out)
    for gradient, exact in zip(
        torch.autograd.grad(out, (q, k, v), weights), torch.autograd.grad(expected, (q, k, v), weights)
    ):
        assert_near(gradient, exact)


def test_alibi_of_each_batch_and_softcap() -> None:
    q, k, v = randn(2, 5, 4, 16), randn(2, 8, 4, 16), randn(2, 8, 4, 16)
    slopes = torch.rand(2, 4)
    assert_near(
        flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes), sdpa(q, k, v, True, alibi=slopes)
    )
    capped = flash_attn.flash_attn_func(q, k, v, softcap=2.0)
    scores = 2.0 * torch.tanh(torch.einsum("bihd,bjhd->bhij", q, k) * 16**-0.5 / 2.0)
    assert_near(capped, torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v))


def test_rows_that_see_no_key_are_zero() -> None:
    q, k, v = randn(1, 6, 2, 16), randn(1, 2, 2, 16), randn(1, 2, 2, 16)
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out[:, :4], torch.zeros(1, 4, 2, 16))
    assert (out[:, 4:] != 0).all()


def test_packed_forms_are_views_of_the_same_call() -> None:
    qkv = randn(2, 7, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    expected = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn.flash_attn_qkvpacked_func(qkv, causal=True), expected)
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], 0.0, None, True), expected)
    with pytest.raises(ValueError, match=r"qkv has shape \[2, 7, 2, 4, 16\]; it takes \[\.\.\., 3, heads, head_dim\]"):
        flash_attn.flash_attn_qkvpacked_func(qkv[:, :, 1:])


def test_return_attn_probs() -> None:
    q, k, v = randn(2, 5, 4, 16), randn(2, 8, 2, 16), randn(2, 8, 2, 16)
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert_near(out, sdpa(q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 16**-0.5
    assert_near(lse, scores.logsumexp(-1))
    assert probabilities.numel() == 0


LENGTHS = [3, 0, 7, 1]
CU = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32)


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_is_a_loop_over_sequences(causal: bool) -> None:
    qkv = randn(11, 3, 4, 16)
    q, k, v = qkv.unbind(1)
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, CU, CU, 7, 7, causal=causal, return_attn_probs=True)
    parts = [slice(start, start + length) for start, length in zip(CU.tolist(), LENGTHS)]
    expected = torch.cat([sdpa(q[None, part], k[None, part], v[None, part], causal)[0] for part in parts])
    assert_near(out, expected)
    assert lse.shape == (4, 11)
    options = {"causal": causal}
    assert torch.equal(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU, 7, **options), out)
    assert torch.equal(flash_attn.flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], CU, CU, 7, 7, **options), out)


def test_unpad_and_pad_are_inverse() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    hidden = randn(2, 4, 5, grad=True)
    packed, indices, cu_seqlens, longest, used = unpad_input(hidden, mask)
    assert torch.equal(packed, hidden[mask.bool()])
    assert indices.tolist() == [0, 1, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 2, 5]
    assert cu_seqlens.dtype == used.dtype == torch.int32
    assert longest == 3
    assert used.tolist() == [2, 3]
    again = pad_input(packed, indices, 2, 4)
    assert torch.equal(again, hidden * mask[..., None])
    (gradient,) = torch.autograd.grad(again.sum(), hidden)
    assert torch.equal(gradient, mask[..., None].expand(2, 4, 5).float())


def test_unpad_keeps_the_places_of_unused_tokens() -> None:
    mask, unused = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1]])
    packed, indices, cu_seqlens, longest, used = unpad_input(randn(2, 4, 5), mask, unused)
    assert packed.shape == (5, 5)
    assert indices.tolist() == [0, 1, 2, 4, 7]
    assert cu_seqlens.tolist() == [0, 3, 5]
    assert longest == 3
    assert used.tolist() == [2, 1]


def test_padded_batch_through_unpad_varlen_pad() -> None:
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    q, k, v = (randn(2, 6, 4, 16) for _ in range(3))
    (pq, indices, cu, longest, _), (pk, *_), (pv, *_) = (unpad_input(t, mask) for t in (q, k, v))
    out = pad_input(flash_attn.flash_attn_varlen_func(pq, pk, pv, cu, cu, longest, longest, causal=True), indices, 2, 6)
    assert_near(out[0], sdpa(q[:1], k[:1], v[:1], True)[0])
    assert_near(out[1, :4], sdpa(q[1:, :4], k[1:, :4], v[1:, :4], True)[0])
    assert not out[1, 4:].any()


# --- flash_attn_with_kvcache ---


@pytest.mark.parametrize("lens", [5, torch.tensor([5, 2], dtype=torch.int32)], ids=["int", "tensor"])
def test_kvcache_appends_then_attends(lens: int | torch.Tensor) -> None:
    q, new_k, new_v = randn(2, 2, 4, 16), randn(2, 2, 2, 16), randn(2, 2, 2, 16)
    k_cache, v_cache = randn(2, 9, 2, 16), randn(2, 9, 2, 16)
    before = k_cache.clone()
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, new_k, new_v, cache_seqlens=lens, causal=True)
    for b, length in enumerate([5, 5] if isinstance(lens, int) else lens.tolist()):
        assert torch.equal(k_cache[b, length : length + 2], new_k[b])
        assert torch.equal(k_cache[b, :length], before[b, :length])
        one = slice(b, b + 1), slice(0, length + 2)
        assert_near(out[one[0]], sdpa(q[one[0]], k_cache[one], v_cache[one], True))
    assert isinstance(lens, int) or lens.tolist() == [5, 2]


def test_kvcache_reads_a_full_cache_without_lengths_and_returns_lse() -> None:
    q, k_cache, v_cache = randn(2, 1, 4, 16), randn(2, 9, 2, 16), randn(2, 9, 2, 16)
    out, lse = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, return_softmax_lse=True)
    assert_near(out, sdpa(q, k_cache, v_cache))
    assert lse.shape == (2, 4, 1)
    with pytest.raises(ValueError, match="cache_seqlens is None"):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k_cache[:, :1], v_cache[:, :1])


def test_kvcache_batch_index_chooses_the_row_in_place() -> None:
    q, new_k, new_v = randn(2, 1, 4, 16), randn(2, 1, 2, 16), randn(2, 1, 2, 16)
    k_cache, v_cache = randn(5, 9, 2, 16), randn(5, 9, 2, 16)
    before = k_cache.clone()
    rows = torch.tensor([3, 1], dtype=torch.int32)
    lens = torch.tensor([4, 6], dtype=torch.int32)
    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, new_k, new_v, cache_seqlens=lens, cache_batch_idx=rows, causal=True
    )
    for b, (row, length) in enumerate(zip(rows.tolist(), lens.tolist())):
        assert torch.equal(k_cache[row, length], new_k[b, 0])
        before[row, length] = new_k[b, 0]
        assert_near(
            out[b : b + 1], sdpa(q[b : b + 1], k_cache[row, None, : length + 1], v_cache[row, None, : length + 1])
        )
    assert torch.equal(k_cache, before)


def test_kvcache_pages_equal_a_dense_cache() -> None:
    q, k_cache, v_cache = randn(2, 1, 4, 16), randn(2, 8, 2, 16), randn(2, 8, 2, 16)
    lens = torch.tensor([7, 5], dtype=torch.int32)
    table = torch.tensor([[3, 0], [2, 1]], dtype=torch.int32)
    k_pages, v_pages = (torch.empty(4, 4, 2, 16) for _ in range(2))
    for pages, cache in ((k_pages, k_cache), (v_pages, v_cache)):
        pages[table.flatten().long()] = cache.reshape(4, 4, 2, 16)
    paged = flash_attn.flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=lens, block_table=table)
    dense = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lens)
    assert_near(paged, dense)


@pytest.mark.parametrize("interleaved", [False, True])
def test_kvcache_rotary(interleaved: bool) -> None:
    """Keys are stored turned; queries and new keys turn by their position in the sequence."""
    q, new_k, new_v = randn(1, 2, 4, 16), randn(1, 2, 2, 16), randn(1, 2, 2, 16)
    k_cache, v_cache = randn(1, 9, 2, 16), randn(1, 9, 2, 16)
    angles = torch.arange(16.0)[:, None] * 10.0 ** -torch.arange(0, 1, 0.125)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: torch.Tensor, start: int) -> torch.Tensor:
        c, s = cos[start : start + x.shape[1], None], sin[start : start + x.shape[1], None]
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        pair = a * c - b * s, a * s + b * c
        return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)

    out = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, new_k, new_v, cos, sin, cache_seqlens=3, causal=True, rotary_interleaved=interleaved
    )
    assert_near(k_cache[:, 3:5], turned(new_k, 3))
    assert_near(out, sdpa(turned(q, 3), k_cache[:, :5], v_cache[:, :5], True))


def test_kvcache_refuses_what_it_does_not_serve() -> None:
    q, cache = randn(1, 2, 2, 16), randn(1, 8, 2, 16)
    cos = torch.ones(8, 8)
    with pytest.raises(ValueError, match="without k and v to append"):
        flash_attn.flash_attn_with_kvcache(q, cache, cache, rotary_cos=cos, rotary_sin=cos, cache_seqlens=4)
    index = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="both choose the memory of a row"):
        flash_attn.flash_attn_with_kvcache(
            q, cache, cache, cache_seqlens=4, cache_batch_idx=index, block_table=index[:, None]
        )
