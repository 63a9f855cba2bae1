"""Jagged nested tensors through attention and sdpa: a loop over the sequences, forward and backward; the sentences for the rest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import foveate

pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")


def jagged(lengths, H=2, D=16, offsets=None):
    values = torch.randn(sum(lengths), H, D, requires_grad=True)
    offsets = torch.tensor([0, *lengths]).cumsum(0) if offsets is None else offsets
    return values, torch.nested.nested_tensor_from_jagged(values, offsets)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_a_loop_over_the_sequences(causal):
    lengths = [3, 7, 1]
    (q, nq), (k, nk), (v, nv) = (jagged(lengths, H) for H in (4, 2, 2))
    nk = torch.nested.nested_tensor_from_jagged(k, nq.offsets())
    nv = torch.nested.nested_tensor_from_jagged(v, nq.offsets())
    out = foveate.attention(nq, nk, nv, causal=causal)
    assert out.is_nested and out.layout is torch.jagged and out.shape == nq.shape
    dout = torch.randn(11, 4, 16)
    grads = torch.autograd.grad(out.values(), (q, k, v), dout)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in xs), is_causal=causal, enable_gqa=True).transpose(
            0, 1
        )
        for xs in zip(*(x.split(lengths) for x in wide))
    ]
    want = torch.cat(parts)
    torch.testing.assert_close(out.values().double(), want, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, torch.autograd.grad(want, wide, dout.double())):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_lengths_of_queries_and_keys_may_differ():
    (_, q), (k, nk) = jagged([2, 0, 4]), jagged([5, 3, 1])
    out, lse = foveate.attention(q, nk, torch.nested.nested_tensor_from_jagged(k, nk.offsets()), return_lse=True)
    want = foveate.attention_varlen(q.values(), k, k, q.offsets(), nk.offsets(), 4, 5, return_lse=True)
    assert torch.equal(out.values(), want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_is_torchs_of_each_sequence(is_causal):
    _, n = jagged([3, 7, 1])
    x = n.detach().transpose(1, 2)
    want = [F.scaled_dot_product_attention(a, a, a, is_causal=is_causal) for a in x.unbind()]
    with foveate.drop_in.sdpa():
        out = F.scaled_dot_product_attention(x, x, x, is_causal=is_causal)
        assert foveate.drop_in.calls() == 1
    assert out.shape == x.shape
    for a, b in zip(out.unbind(), want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_refused_says_so():
    _, n = jagged([3, 2])
    strided = torch.nested.nested_tensor([torch.randn(3, 2, 8)])
    dense, t = torch.randn(2, 3, 2, 16), n.transpose(1, 2)
    for call, words in (
        (lambda: foveate.attention(n, dense, dense), "k is no nested tensor"),
        (lambda: foveate.attention(dense, n, n), "k is a nested tensor"),
        (lambda: foveate.attention(strided, strided, strided), "q is a nested tensor of layout .*layout=torch.jagged"),
        (lambda: foveate.attention(n, n, n, mask=torch.ones(1, dtype=torch.bool)), "mask does not go with nested"),
        (lambda: foveate.attention(n, n, n, kv_lens=torch.tensor([1, 1])), "kv_lens does not go with nested"),
        (lambda: foveate.attention(n, n, jagged([2, 3])[1]), "different lengths"),
        (lambda: foveate.attention(t, t, t), r"must be \[B, lengths, H, D\]"),
        (lambda: foveate.sdpa(t, t, dense), "value must be a jagged nested tensor"),
        (lambda: foveate.sdpa(t, t, t, torch.ones(1, dtype=torch.bool)), "attn_mask does not go with nested"),
        (lambda: foveate.rms_norm(n, None, 1e-6), r"x is a nested tensor .*values\(\)"),
        (lambda: foveate.softmax(n), r"x is a nested tensor .*values\(\)"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
