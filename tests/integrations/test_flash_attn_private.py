"""Names of flash_attn below its documentation that other packages call: backward passes, rotary kernels, norms of some rows."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.integrations import flash_attn
from foveate.integrations.flash_attn import flash_attn_interface as interface
from foveate.integrations.flash_attn.layers.rotary import apply_rotary_emb
from foveate.integrations.flash_attn.ops import layer_norm, rms_norm
from foveate.integrations.flash_attn.ops.triton.rotary import apply_rotary

near = torch.testing.assert_close


def test_the_backward_of_a_part_of_the_keys():
    """As ring attention has it: out and lse over all keys, the gradients of each part of the keys by itself."""
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, softcap=3.0, return_attn_probs=True)
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(out, leaves, dout)
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    for keys in (slice(0, 4), slice(4, 9)):
        part = [torch.full_like(x, float("nan")) for x in (q, k[:, keys], v[:, keys])]
        delta = interface._flash_attn_backward(
            dout, q.detach(), k.detach()[:, keys], v.detach()[:, keys], out.detach(), lse.detach(), *part, 0.0, None, False, -1, -1, 3.0,
            None, True,
        )  # fmt: skip
        dq += part[0]
        dk[:, keys], dv[:, keys] = part[1:]
    for gradient, expected in zip((dq, dk, dv), wanted):
        near(gradient, expected, rtol=1e-4, atol=1e-5)
    near(delta, (dout * out).sum(-1).transpose(1, 2).detach(), rtol=1e-4, atol=1e-5)
    given = [x.detach() for x in (q, k, v, out, lse)]
    with pytest.raises(foveate.UnsupportedError, match=r"dropout_p=0.1: the mask"):
        interface._flash_attn_backward(dout, *given, None, None, None, 0.1, None, False, -1, -1, 0.0, None, True)


def test_the_backward_of_packed_sequences():
    q, k, v = (torch.randn(7, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    cu, slopes = torch.tensor([0, 2, 7], dtype=torch.int32), torch.rand(4)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, cu, cu, 5, 5, causal=True, window_size=(2, 0), alibi_slopes=slopes, return_attn_probs=True
    )
    dout = torch.randn_like(out)
    wanted = torch.autograd.grad(out, (q, k, v), dout)
    found = [torch.empty_like(x) for x in (q, k, v)]
    given = [x.detach() for x in (q, k, v, out, lse)]
    interface._flash_attn_varlen_backward(
        dout, *given, *found, cu, cu, 5, 5, 0.0, 16**-0.5, True, 2, 0, 0.0, slopes, False
    )
    for gradient, expected in zip(found, wanted):
        near(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_rotary_kernel_by_its_name():
    x, cos, sin = torch.randn(2, 5, 3, 16), torch.randn(9, 4), torch.randn(9, 4)
    turned = apply_rotary(x, cos, sin, seqlen_offsets=2, interleaved=True)
    near(turned, apply_rotary_emb(x, cos, sin, interleaved=True, seqlen_offsets=2))
    back = apply_rotary(x, cos, sin, torch.tensor([1, 4]), conjugate=True)
    near(back, apply_rotary_emb(x, cos, -sin, seqlen_offsets=torch.tensor([1, 4])))


@pytest.mark.parametrize("rms", [False, True])
def test_norms_of_some_rows(rms):
    """Stochastic depth: rows without a branch keep their residual, and rows that no later branch reads have no norm."""
    function = rms_norm.dropout_add_rms_norm_subset if rms else layer_norm.dropout_add_layer_norm_subset
    x, residual, weight = torch.randn(3, 8), torch.randn(2, 3, 8), torch.randn(8)
    into, chosen = torch.tensor([[1, 0, 2], [0, 3, 0]]), torch.tensor([[0, 1, 0], [2, 3, 0]])
    out, total = function(
        x, residual, weight, None, 0.0, 1e-5, None, into.int(), chosen.int(), 2.0, out_numrows=3, prenorm=True
    )
    expected = residual.clone()
    expected[into > 0] += 2 * x
    near(total, expected)
    picked = expected[chosen > 0]
    near(out, foveate.rms_norm(picked, weight, 1e-5) if rms else torch.nn.functional.layer_norm(picked, (8,), weight))
    everything = function(expected, None, weight, None, 0.0, 1e-5)
    near(everything[chosen > 0], out)
