"""foveate.integrations.torch_flash: torch's own entry points with foveate in the place of its flash kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention

from foveate.integrations import torch_flash
from foveate.ops.attention import op as attention_op

needs_registry = pytest.mark.skipif(
    not hasattr(attention, "register_flash_attention_impl"),
    reason="this torch has no registry of flash implementations",
)
near = torch.testing.assert_close


def qkv(Sq=9, Skv=9, H=4):
    return [torch.randn(2, H, n, 16, requires_grad=True) for n in (Sq, Skv, Skv)]


@needs_registry
@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "bias", "causal 4x9", "causal 9x4"])
def test_activated(kind):
    Sq, Skv = {"causal 4x9": (4, 9), "causal 9x4": (9, 4)}.get(kind, (9, 9))
    q, k, v = qkv(Sq, Skv)
    mask = {"mask": torch.rand(9, 9) < 0.8, "bias": torch.randn(1, 1, 9, 9)}.get(kind)
    mask = mask | torch.eye(9, dtype=torch.bool) if kind == "mask" else mask
    options = {"attn_mask": mask, "is_causal": "causal" in kind, "scale": 0.3}
    expected = F.scaled_dot_product_attention(q, k, v, **options)
    gradients = torch.autograd.grad(expected.sin().sum(), (q, k, v))
    torch_flash.register()
    assert "foveate" in attention.list_flash_attention_impls()
    before = attention_op.runs()
    attention.activate_flash_attention_impl("foveate")
    try:
        assert attention.current_flash_attention_impl() == "foveate"
        with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, **options)
        found = torch.autograd.grad(out.sin().sum(), (q, k, v))
    finally:
        attention.restore_flash_attention_impl()
    assert attention_op.runs() == before + 1
    near(out, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, gradients):
        near(a, b, rtol=1e-4, atol=1e-5)
    F.scaled_dot_product_attention(q, k, v, **options)
    assert attention_op.runs() == before + 1, "restored"


def test_a_torch_without_the_registry_is_named(monkeypatch):
    monkeypatch.delattr(attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match=r"has no registry of flash attention implementations"):
        torch_flash.register()


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_the_ops_of_a_gpu(dropout_p):
    """Called directly, as no GPU is here: [B, H, S, D], causal to the bottom right, dropout redrawn by the backward op."""
    q, k, v = qkv(5, 9)
    torch.manual_seed(0)
    out, lse, _, _, _, _, rng, unused, _ = torch_flash._dense_forward(q, k, v, dropout_p, True)
    weights = (q @ k.mT * 0.25).masked_fill(~torch.ones(5, 9, dtype=torch.bool).tril(4), float("-inf"))
    near(lse, weights.logsumexp(-1), rtol=1e-5, atol=1e-5)
    keep = torch.ones(2, 4, 5, 9)
    if dropout_p:
        from foveate.backend.reference.attention import philox_keep

        keep = philox_keep(rng, dropout_p, 2, 4, 5, 9) / (1 - dropout_p)
    expected = (weights.softmax(-1) * keep) @ v
    near(out, expected, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(out)
    found = torch_flash._dense_backward(g, q, k, v, out, lse, None, None, 5, 9, dropout_p, True, rng, unused)
    for a, b in zip(found, torch.autograd.grad(expected, (q, k, v), g)):
        near(a, b, rtol=1e-4, atol=1e-5)


def test_the_packed_ops_of_a_gpu():
    q, k, v = (torch.randn(n, 4, 16, requires_grad=True) for n in (7, 9, 9))
    cu_q, cu_k = torch.tensor([0, 3, 7]).int(), torch.tensor([0, 3, 9]).int()
    lengths = (cu_q, cu_k, 4, 6)
    out, lse, rng, unused, _ = torch_flash._flash_forward(q, k, v, *lengths, 0.0, True, False, window_size_left=2)
    parts = []
    for (a, b), (c, d) in (((0, 3), (0, 3)), ((3, 7), (3, 9))):
        distance = torch.arange(d - c) - torch.arange(b - a)[:, None] - (d - c) + (b - a)
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[c:d]) / 4
        scores = scores.masked_fill((distance > 0) | (distance < -2), float("-inf"))
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[c:d]))
    expected = torch.cat(parts)
    near(out, expected, rtol=1e-5, atol=1e-5)
    g = torch.randn_like(out)
    found = torch_flash._flash_backward(
        g, q, k, v, out, lse, *lengths, 0.0, True, rng, unused, window_size_left=2, window_size_right=None
    )
    for a, b in zip(found, torch.autograd.grad(expected, (q, k, v), g)):
        near(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="does not serve block_table"):
        torch_flash._flash_forward(q, k, v, *lengths, 0.0, True, False, block_table=cu_q)
