"""foveate.integrations.xformers: each bias class against torch with the mask written out."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.integrations import xformers as xf

H, K = 4, 16
near = torch.testing.assert_close


def plain(q, k, v, keep=None, bias=None):
    """[B, M, H, K] by torch in fp64; rows that see nothing are 0."""
    mask = (
        torch.zeros(q.shape[1], k.shape[1]).double() if keep is None else torch.where(keep, 0.0, float("-inf")).double()
    )
    mask = mask if bias is None else mask + bias.double()
    args = (x.transpose(1, 2).double() for x in (q, k, v))
    return F.scaled_dot_product_attention(*args, mask).nan_to_num().transpose(1, 2).float()


def qkv(M, N, B=2):
    return [torch.randn(B, n, H, K, requires_grad=True) for n in (M, N, N)]


def distance(M, N, corner):
    return torch.arange(N) - torch.arange(M)[:, None] - (0 if corner == "top-left" else N - M)


@pytest.mark.parametrize(("M", "N"), [(7, 7), (4, 9), (9, 4)])
@pytest.mark.parametrize("kind", ["none", "tensor", "bool", "lower", "with bias", "bottom", "bottom local", "local"])
def test_dense(kind, M, N):
    q, k, v = qkv(M, N)
    tensor = torch.randn(2, H, M, N, requires_grad=True)
    top, bottom = distance(M, N, "top-left"), distance(M, N, "bottom-right")
    keep = torch.rand(M, N) < 0.6
    bias, expected = {
        "none": (None, plain(q, k, v)),
        "tensor": (tensor, plain(q, k, v, bias=tensor)),
        "bool": (keep, plain(q, k, v, keep)),
        "lower": (xf.LowerTriangularMask(), plain(q, k, v, top <= 0)),
        "with bias": (xf.LowerTriangularMask().add_bias(tensor), plain(q, k, v, top <= 0, tensor)),
        "bottom": (xf.LowerTriangularFromBottomRightMask(), plain(q, k, v, bottom <= 0)),
        "bottom local": (
            xf.LowerTriangularFromBottomRightMask().make_local_attention(3),
            plain(q, k, v, (bottom <= 0) & (bottom > -3)),
        ),
        "local": (xf.LocalAttentionFromBottomRightMask(2, 1), plain(q, k, v, (bottom <= 1) & (bottom >= -2))),
    }[kind]
    out = xf.memory_efficient_attention(q, k, v, bias)
    near(out, expected, rtol=1e-5, atol=1e-5)
    inputs = [q, k, v] + ([tensor] if kind in ("tensor", "with bias") else [])
    rows = torch.ones(M, 1, 1) if kind != "bool" else keep.any(-1)[:, None, None].float()
    for a, b in zip(*(torch.autograd.grad((x.sin() * rows).sum(), inputs) for x in (out, expected))):
        near(a, b.nan_to_num(), rtol=1e-4, atol=1e-4)


LENGTHS = [([3, 1, 5], [3, 1, 5]), ([3, 1, 4], [6, 1, 5]), ([3, 4, 1], [2, 4, 5])]


@pytest.mark.parametrize(("lens_q", "lens_k"), LENGTHS)
@pytest.mark.parametrize("kind", ["", "Causal", "CausalFromBottomRight", "CausalLocalAttentionFromBottomRight", "PaddedKeys",
                                  "CausalWithOffsetPaddedKeys"])  # fmt: skip
def test_packed(kind, lens_q, lens_k):
    padded = "PaddedKeys" in kind
    cls = getattr(xf, f"BlockDiagonal{kind}Mask")
    starts_k = [8 * b for b in range(4)] if padded else [sum(lens_k[:b]) for b in range(4)]
    mask = cls.from_seqlens(lens_q, 8, lens_k) if padded else cls.from_seqlens(lens_q, lens_k)
    if "Local" in kind:
        mask._window_size = 2
    q = torch.randn(1, sum(lens_q), H, K)
    k, v = (torch.randn(1, starts_k[-1], H, K) for _ in range(2))
    parts, start = [], 0
    for n, m, first in zip(lens_q, lens_k, starts_k):
        d = distance(n, m, "top-left" if kind == "Causal" else "bottom-right")
        keep = d <= 0 if "Causal" in kind else torch.ones_like(d, dtype=torch.bool)
        keep = keep & (d > -2) if "Local" in kind else keep
        own = slice(first, first + m)
        parts.append(plain(q[:, start : start + n], k[:, own], v[:, own], keep))
        start += n
    near(xf.memory_efficient_attention(q, k, v, mask), torch.cat(parts, 1), rtol=1e-5, atol=1e-5)


def test_tensor_lists_and_grouped_heads():
    tensors = [torch.randn(2, 3, H, K), torch.randn(1, 5, H, K)]
    mask, packed = xf.BlockDiagonalMask.from_tensor_list(tensors)
    for x, y in zip(mask.split(xf.memory_efficient_attention(packed, packed, packed, mask)), tensors):
        near(x, plain(y, y, y), rtol=1e-5, atol=1e-5)
    q = torch.randn(2, 7, 2, H, K)
    k = torch.randn(2, 9, 2, 1, K).expand(-1, -1, -1, H, -1)
    out = xf.memory_efficient_attention(q, k, k, scale=K**-0.5)
    full = plain(q.flatten(2, 3), *(k.reshape(2, 9, 2 * H, K),) * 2)
    near(out, full.unflatten(2, (2, H)), rtol=1e-5, atol=1e-5)
    one = torch.randn(2, 7, K)
    near(xf.memory_efficient_attention(one, one, one), plain(*(one[:, :, None],) * 3)[:, :, 0], rtol=1e-5, atol=1e-5)


def test_xformers_own_objects_are_known_by_name_and_others_refused():
    class LowerTriangularMask:  # stands for xformers' class
        pass

    class TreeMask:
        pass

    q, k, v = qkv(5, 5)
    near(xf.memory_efficient_attention(q, k, v, LowerTriangularMask()), plain(q, k, v, distance(5, 5, "top-left") <= 0),
         rtol=1e-5, atol=1e-5)  # fmt: skip
    with pytest.raises(foveate.UnsupportedError, match="attn_bias is a TreeMask"):
        xf.memory_efficient_attention(q, k, v, TreeMask())
    with pytest.raises(foveate.UnsupportedError, match="names a kernel of xformers"):
        xf.memory_efficient_attention(q, k, v, op=object())
    with pytest.raises(ValueError, match="packed into one row"):
        xf.memory_efficient_attention(q, k, v, xf.BlockDiagonalMask.from_seqlens([5]))


def test_unmodified_programs_import_it(monkeypatch):
    for name in ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    xf.install()
    try:
        import xformers.ops as xops
        from xformers.ops.fmha.attn_bias import BlockDiagonalMask

        assert xops.memory_efficient_attention is xf.memory_efficient_attention
        assert BlockDiagonalMask is xf.BlockDiagonalMask is xops.fmha.attn_bias.BlockDiagonalMask
        with pytest.raises(AttributeError, match="has no SwiGLU"):
            _ = xops.SwiGLU
        sys.modules["xformers"] = ModuleType("xformers")
        with pytest.raises(RuntimeError, match="imported already"):
            xf.install()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
            del sys.modules[name]


BIASES = {
    "top-left": xf.LowerTriangularMask(),
    "top-left and a tensor": xf.LowerTriangularMask().add_bias(torch.randn(7, 7)),
    "bottom-right": xf.LowerTriangularFromBottomRightMask(),
    "bottom-right, local": xf.LowerTriangularFromBottomRightMask().make_local_attention(3),
    "local": xf.LocalAttentionFromBottomRightMask(2, 1),
    "blocks": xf.BlockDiagonalMask.from_seqlens([3, 4], [2, 5]),
    "blocks, causal": xf.BlockDiagonalMask.from_seqlens([3, 4]).make_causal(),
    "blocks, bottom-right": xf.BlockDiagonalMask.from_seqlens([2, 5], [3, 4]).make_causal_from_bottomright(),
    "blocks, local": xf.BlockDiagonalMask.from_seqlens([3, 4]).make_local_attention(2),
    "blocks, local, bottom-right": xf.BlockDiagonalMask.from_seqlens([2, 5], [2, 5]).make_local_attention_from_bottomright(2),
    "padded keys": xf.BlockDiagonalPaddedKeysMask.from_seqlens([3, 4], 5, [2, 5]),
    "padded keys, causal": xf.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens([1, 6], 8, [2, 7]),
}  # fmt: skip


@pytest.mark.parametrize("name", BIASES)
def test_a_bias_as_a_tensor_means_the_same(name):
    bias = BIASES[name]
    keys = bias.k_seqinfo.seqstart_py[-1] if isinstance(bias, xf.BlockDiagonalMask) else 7
    q, k, v = torch.randn(1, 7, 2, 8), torch.randn(1, keys, 2, 8), torch.randn(1, keys, 2, 8)
    added = bias.materialize((1, 1, 7, keys))
    out, expected = xf.memory_efficient_attention(q, k, v, bias), xf.memory_efficient_attention(q, k, v, added)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_lists_of_queries_and_keys():
    qs, ks = [torch.randn(2, 3, 2, 8), torch.randn(1, 4, 2, 8)], [torch.randn(2, 5, 2, 8), torch.randn(1, 2, 2, 8)]
    mask, q, k, v = xf.BlockDiagonalMask.from_tensor_lists_qkv(qs, ks, ks)
    parts = mask.split_queries(xf.memory_efficient_attention(q, k, v, mask))
    for part, own_q, own_k in zip(parts, qs, ks):
        torch.testing.assert_close(part, xf.memory_efficient_attention(own_q, own_k, own_k), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(mask.split_kv(k), ks))
    with pytest.raises(ValueError, match=r"batches of \[2, 1\] and the keys of \[3\]"):
        xf.BlockDiagonalMask.from_tensor_lists_qk(qs, [torch.randn(3, 5, 2, 8)])
