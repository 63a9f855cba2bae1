"""What else the flash_attn package has: pages in varlen, left padding, dropout masks, rotary, losses, norms, MHA, install()."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.integrations import flash_attn
from foveate.integrations.flash_attn import bert_padding
from foveate.integrations.flash_attn.layers import rotary
from foveate.integrations.flash_attn.losses.cross_entropy import CrossEntropyLoss
from foveate.integrations.flash_attn.modules import mha
from foveate.integrations.flash_attn.ops import layer_norm as fused_layer_norm
from foveate.integrations.flash_attn.ops import rms_norm
from foveate.integrations.flash_attn.ops.triton import layer_norm

B, S, HQ, HKV, D = 3, 12, 4, 2, 16
near = torch.testing.assert_close


def qkv(Sq: int = S, Sk: int = S) -> tuple[torch.Tensor, ...]:
    return torch.randn(B, Sq, HQ, D), torch.randn(B, Sk, HKV, D), torch.randn(B, Sk, HKV, D)


@pytest.mark.parametrize("window", [[3, 1], np.array([3, 1]), torch.tensor([3, 1]), (np.int64(3), 1)])
def test_windows_in_any_form(window: object) -> None:
    q, k, v = qkv()
    near(flash_attn.flash_attn_func(q, k, v, window_size=window), foveate.attention(q, k, v, window=(3, 1)))
    with pytest.raises(ValueError, match="must be a pair"):
        flash_attn.flash_attn_func(q, k, v, window_size=(1, 2, 3))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_varlen_with_pages(causal: bool, grad: bool) -> None:
    """As without pages, with gradients of queries and pages; pages in no order, lengths 1 and 0 among them."""
    pages = [torch.randn(9, 4, HKV, D).requires_grad_(grad) for _ in range(2)]
    lens_q, lens_k = [5, 0, 2], [9, 4, 1]
    table = torch.tensor([[8, 2, 5], [0, 1, 1], [7, 3, 3]], dtype=torch.int32)
    cu_q, cu_k = (torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in (lens_q, lens_k))
    q = torch.randn(7, HQ, D).requires_grad_(grad)
    rows = torch.cat([table[b, torch.arange(n) // 4] * 4 + torch.arange(n) % 4 for b, n in enumerate(lens_k)]).long()
    k, v = (x.flatten(0, 1)[rows] for x in pages)
    options = {"causal": causal, "window_size": (6, -1), "return_attn_probs": True}
    out, lse, _ = flash_attn.flash_attn_varlen_func(q, *pages, cu_q, cu_k, 5, 9, block_table=table, **options)
    expected, expected_lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 9, **options)
    near(out, expected, rtol=1e-5, atol=1e-5)
    near(lse, expected_lse, rtol=1e-5, atol=1e-5)
    if grad:
        for a, b in zip(*(torch.autograd.grad(x.sin().sum(), (q, *pages)) for x in (out, expected))):
            near(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("paged", [False, True])
def test_left_padding_of_a_cache(paged: bool) -> None:
    """Each sequence begins at its own key; appended keys land behind it; ALiBi and windows count from it."""
    lens, left = torch.tensor([7, 5, 8], dtype=torch.int32), torch.tensor([2, 0, 6], dtype=torch.int32)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32)
    dense = [torch.randn(5, S, HKV, D) for _ in range(2)]
    caches = [x.clone().reshape(15, 4, HKV, D) if paged else x.clone() for x in dense]
    where = {"block_table": rows[:, None] * 3 + torch.arange(3)} if paged else {"cache_batch_idx": rows}
    where = {name: x.int() for name, x in where.items()}
    q, k, v = torch.randn(B, 2, HQ, D), torch.randn(B, 2, HKV, D), torch.randn(B, 2, HKV, D)
    options = {"causal": True, "window_size": (4, -1), "alibi_slopes": torch.rand(HQ)}
    out = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lens, cache_leftpad=left, **where, **options
    )
    for b in range(B):
        n, start, row = int(lens[b]), int(left[b]), int(rows[b])
        own = [torch.cat([x[row, start:n], new[b]])[None] for x, new in zip(dense, (k, v))]
        near(out[b : b + 1], flash_attn.flash_attn_func(q[b : b + 1], *own, **options), rtol=1e-5, atol=1e-5)
        dense[0][row, n : n + 2], dense[1][row, n : n + 2] = k[b], v[b]
    assert all(torch.equal(x.view_as(y), y) for x, y in zip(caches, dense))


@pytest.mark.parametrize(("causal", "leftpad"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_a_cache_step(causal: bool, leftpad: bool, interleaved: bool) -> None:
    """Without causal and window all queries stand at cache_seqlens, as in flash_attn; keys at cache_seqlens + i in any case."""
    lens = torch.tensor([3, 6, 5], dtype=torch.int32)
    caches = [torch.randn(B, S, HKV, D) for _ in range(2)]
    q, k, v = torch.randn(B, 3, HQ, D), torch.randn(B, 3, HKV, D), torch.randn(B, 3, HKV, D)
    angles = torch.rand(S, 4) * 6
    cos, sin = angles.cos(), angles.sin()
    left = {"cache_leftpad": torch.tensor([1, 2, 0], dtype=torch.int32)} if leftpad else {}
    expected_caches = [x.clone() for x in caches]
    turned_k = torch.stack([turned(k[b], angles, int(lens[b]) + torch.arange(3), interleaved) for b in range(B)])
    step = torch.arange(3) if causal else torch.zeros(3, dtype=torch.long)
    turned_q = torch.stack([turned(q[b], angles, int(lens[b]) + step, interleaved) for b in range(B)])
    expected = flash_attn.flash_attn_with_kvcache(
        turned_q, *expected_caches, turned_k, v, cache_seqlens=lens, causal=causal, **left
    )
    out = flash_attn.flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, lens, causal=causal, rotary_interleaved=interleaved, **left
    )
    near(out, expected, rtol=1e-5, atol=1e-5)
    near(caches[0], expected_caches[0], rtol=1e-5, atol=1e-5)


def turned(x: torch.Tensor, angles: torch.Tensor, places: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [S, H, D] rotated as complex numbers."""
    rot = 2 * angles.shape[1]
    head, tail = x[..., :rot], x[..., rot:]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).transpose(-1, -2)
    number = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(()), angles[places])[:, None]
    pairs = torch.view_as_real(number)
    return torch.cat([(pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2), tail], -1)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_mask_of_the_call(packed: bool) -> None:
    """The sign of S_dmask says what was dropped, its value how large the weight was: together they give the output."""
    q, k, v = qkv(5, 8)
    options = {"dropout_p": 0.3, "causal": True, "alibi_slopes": torch.rand(B, HQ), "return_attn_probs": True}
    if packed:
        cu_q, cu_k = torch.arange(B + 1).int() * 5, torch.arange(B + 1).int() * 8
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out, lse, signed = flash_attn.flash_attn_varlen_func(*flat, cu_q, cu_k, 5, 8, **options)
        out = out.unflatten(0, (B, 5))
    else:
        out, lse, signed = flash_attn.flash_attn_func(q, k, v, **options)
    assert signed.shape == (B, HQ, 5, 8)
    weights = signed.abs() / signed.abs().sum(-1, keepdim=True)
    values = v.repeat_interleave(HQ // HKV, 2).permute(0, 2, 1, 3)
    expected = torch.where(signed > 0, weights, 0.0) @ values / 0.7
    near(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
    struck = (signed < 0).sum() / (signed != 0).sum()
    assert 0.2 < float(struck) < 0.4


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [0, 3, torch.tensor([4, 0, 2])])
@pytest.mark.parametrize("inplace", [False, True])
def test_apply_rotary_emb(interleaved: bool, offsets: int | torch.Tensor, inplace: bool) -> None:
    x, angles = torch.randn(B, 7, HQ, D, requires_grad=True), torch.rand(S, 6) * 6
    starts = offsets if isinstance(offsets, torch.Tensor) else torch.full((B,), offsets)
    original = x.detach().clone().requires_grad_()
    expected = torch.stack([turned(original[b], angles, starts[b] + torch.arange(7), interleaved) for b in range(B)])
    out = rotary.apply_rotary_emb(x, angles.cos(), angles.sin(), interleaved, inplace, offsets)
    near(out, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, out if inplace else original)
    g = torch.randn_like(out)
    near(torch.autograd.grad(out, x, g)[0], torch.autograd.grad(expected, original, g)[0], rtol=1e-5, atol=1e-5)
    # Packed: sequences of 7, 0 and 4 rows.
    cu = torch.tensor([0, 7, 7, 11], dtype=torch.int32)
    rows = torch.cat([original[0], original[2][:4]]).detach()
    packed = rotary.apply_rotary_emb(
        rows, angles.cos(), angles.sin(), interleaved, seqlen_offsets=offsets, cu_seqlens=cu
    )
    near(packed, torch.cat([expected[0], expected[2][:4]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gqa", [False, True])
def test_rotary_embedding_in_place(gqa: bool) -> None:
    module = rotary.RotaryEmbedding(8)
    angles = torch.arange(S)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    x = torch.randn(B, 7, HQ + 2 * HKV, D) if gqa else torch.randn(B, 7, 3, HQ, D)
    expected = x.clone()
    of_q_and_k = [slice(0, HQ), slice(HQ, HQ + HKV)] if gqa else [0, 1]
    for part in of_q_and_k:
        for b in range(B):
            expected[b, :, part] = turned(x[b, :, part].contiguous(), angles, 2 + torch.arange(7), False)
    out = module(x, seqlen_offset=2, num_heads_q=HQ if gqa else None)
    assert out is x, "without a gradient it is written in place"
    near(x, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pass max_seqlen"):
        module(x, seqlen_offset=torch.tensor([1, 2, 3]), num_heads_q=HQ if gqa else None)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"logit_scale": 0.7}, {"lse_square_scale": 0.01}])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(options: dict[str, float], reduction: str) -> None:
    logits = torch.randn(9, 31, requires_grad=True)
    labels = torch.randint(0, 31, (9,))
    labels[3] = -100
    scaled = logits * options.get("logit_scale", 1.0)
    smoothing = options.get("label_smoothing", 0.0)
    rows = F.cross_entropy(scaled, labels, label_smoothing=smoothing, reduction="none")
    z = options.get("lse_square_scale", 0.0) * scaled.logsumexp(-1).square() * (labels != -100)
    reduce = {"none": lambda x: x, "sum": torch.sum, "mean": lambda x: x.sum() / 8}[reduction]
    loss, z_loss = CrossEntropyLoss(reduction=reduction, return_z_loss=True, **options)(logits, labels)
    near(loss, reduce(rows + z), rtol=1e-5, atol=1e-5)
    near(z_loss, reduce(z), rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, reduce(rows + z))]
    near(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("residual", [None, torch.float32])
def test_norms(rms: bool, residual: torch.dtype | None) -> None:
    x, weight, bias, weight1 = torch.randn(5, 24), torch.randn(24), torch.randn(24), torch.randn(24)
    before = None if residual is None else torch.randn(5, 24)
    x1, scale = torch.randn(5, 24), torch.randn(5)
    total = x + x1 + (0 if before is None else before)

    def norm(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not rms:
            return F.layer_norm(y, (24,), weight, bias, 1e-6)
        return F.rms_norm(y, (24,), weight, 1e-6) + (0 if bias is None else bias)

    out, out1, kept = layer_norm.layer_norm_fn(
        x, weight, bias, before, x1, weight1, zero_centered_weight=True, is_rms_norm=rms, prenorm=True
    )
    near(out, norm(total, weight + 1, bias), rtol=1e-5, atol=1e-5)
    near(out1, norm(total, weight1 + 1, None), rtol=1e-5, atol=1e-5)
    near(kept, total)
    scaled = layer_norm.rms_norm_fn(x, weight, None, before, rowscale=scale)
    total = x * scale[:, None] + (0 if before is None else before)
    near(scaled, F.rms_norm(total, (24,), weight, 1e-6), rtol=1e-5, atol=1e-5)
    if rms:
        near(rms_norm.rms_norm(x, weight, 1e-6), F.rms_norm(x, (24,), weight, 1e-6), rtol=1e-5, atol=1e-5)
        out, mask = rms_norm.dropout_add_rms_norm(x, before, weight, None, 0.4, 1e-6, return_dropout_mask=True)
        total = torch.where(mask, x, 0.0) / 0.6 + (0 if before is None else before)
        near(out, F.rms_norm(total, (24,), weight, 1e-6), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rms", [False, True])
def test_fused_norms(rms: bool, dtype: torch.dtype) -> None:
    """flash_attn.ops.layer_norm and ops.rms_norm: the sum in the residual's dtype, and two norms of two parallel branches."""
    x, x1 = torch.randn(5, 24).to(dtype), torch.randn(5, 24).to(dtype)
    weight, weight1, bias, residual, scale = (torch.randn(s) for s in (24, 24, 24, (5, 24), 24))
    tolerance = {"rtol": 2e-5 if dtype == torch.float32 else 1e-2, "atol": 2e-5 if dtype == torch.float32 else 2e-2}

    def norm(y: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        plain = F.rms_norm(y, (24,), weight, 1e-6) if rms else F.layer_norm(y, (24,), weight, None, 1e-6)
        return (plain if bias is None else plain + bias).to(dtype)

    ours = rms_norm if rms else fused_layer_norm
    one = ours.dropout_add_rms_norm if rms else ours.dropout_add_layer_norm
    two = ours.dropout_add_rms_norm_parallel_residual if rms else ours.dropout_add_layer_norm_parallel_residual
    out, total = one(x, residual, weight, bias, 0.0, 1e-6, layerscale=scale, prenorm=True)
    assert out.dtype == dtype and total.dtype == torch.float32
    near(total, x * scale + residual)
    near(out, norm(total, weight, bias), **tolerance)
    assert one(x, None, weight, bias, 0.0, 1e-6, prenorm=True)[1].dtype == dtype
    assert one(x, None, weight, bias, 0.0, 1e-6, prenorm=True, residual_in_fp32=True)[1].dtype == torch.float32
    out, out1, total, mask, mask1 = two(
        x, x1, residual, weight, bias, weight1, None, 0.3, 1e-6, prenorm=True, return_dropout_mask=True
    )
    assert mask.dtype == mask1.dtype == torch.bool and not torch.equal(mask, mask1)
    near(total, x.masked_fill(~mask, 0) / 0.7 + x1.masked_fill(~mask1, 0) / 0.7 + residual, **tolerance)
    near(out, norm(total, weight, bias), **tolerance)
    near(out1, norm(total, weight1, None), **tolerance)
    assert two(x, None, residual, weight, bias, None, None, 0.0, 1e-6)[1] is None
    module = (ours.DropoutAddRMSNorm if rms else ours.DropoutAddLayerNorm)(24, prenorm=True, p=0.5).eval()
    assert (module.bias is None) == rms
    near(module(x.float(), residual)[0], norm(x.float() + residual, torch.ones(24), None).float(), rtol=1e-2, atol=2e-2)
    if not rms:
        near(ours.layer_norm(x, weight, bias, 1e-6), norm(x.float(), weight, bias), **tolerance)


@pytest.mark.parametrize("kind", ["plain", "gqa", "rotary", "alibi", "window", "cross", "dwconv", "gqa dwconv"])
def test_mha(kind: str) -> None:
    """Projections, attention and output by torch, with the weights of the module."""
    E = HQ * D
    options = {
        "gqa": {"num_heads_kv": HKV}, "rotary": {"rotary_emb_dim": 8}, "alibi": {"use_alibi": True},
        "window": {"window_size": (3, 0)}, "cross": {"cross_attn": True}, "dwconv": {"dwconv": True},
        "gqa dwconv": {"num_heads_kv": HKV, "dwconv": True},
    }.get(kind, {})  # fmt: skip
    module = mha.MHA(E, HQ, causal=kind != "cross", use_flash_attn=True, **options)
    x, other = torch.randn(B, S, E), torch.randn(B, 9, E)
    out = module(x, other) if kind == "cross" else module(x)
    heads_k = HKV if "gqa" in kind else HQ
    sizes = [E, heads_k * D, heads_k * D]
    if kind == "cross":
        parts = [module.Wq(x), *module.Wkv(other).split(sizes[1:], -1)]
    else:
        projected = module.Wqkv(x)
        if "dwconv" in kind:
            names = ["dwconv_q", "dwconv_kv"] if "gqa" in kind else ["dwconv_qkv"]
            weight = torch.cat([getattr(module, name).weight for name in names])
            bias = torch.cat([getattr(module, name).bias for name in names])
            shifted = F.pad(projected, (0, 0, 2, 0)).unfold(1, 3, 1)  # causal: two rows back and this one
            projected = (shifted * weight[:, 0]).sum(-1) + bias
        parts = list(projected.split(sizes, -1))
    q, k, v = (p.unflatten(-1, (-1, D)) for p in parts)
    if kind == "rotary":
        angles = torch.arange(S)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
        q, k = (torch.stack([turned(row, angles, torch.arange(S), False) for row in t]) for t in (q, k))
    distance = torch.arange(k.shape[1]) - torch.arange(S)[:, None]
    bias = torch.zeros(HQ, S, k.shape[1])
    if kind != "cross":
        bias = bias.masked_fill(distance > 0, float("-inf"))
    if kind == "window":
        bias = bias.masked_fill(distance < -3, float("-inf"))
    if kind == "alibi":
        bias = bias - torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8])[:, None, None] * distance.abs()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    context = F.scaled_dot_product_attention(q, k, v, bias[None], enable_gqa=True)
    near(out, module.out_proj(context.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"rotary_emb_dim": 8}, {"num_heads_kv": HKV, "window_size": (4, 0)}])
def test_mha_step_by_step(options: dict[str, object]) -> None:
    module = mha.MHA(HQ * D, HQ, causal=True, use_flash_attn=True, layer_idx=0, **options).eval()
    x = torch.randn(B, 7, HQ * D)
    params = SimpleNamespace(
        max_seqlen=S,
        max_batch_size=B,
        seqlen_offset=0,
        batch_size_offset=0,
        key_value_memory_dict={},
        lengths_per_sample=None,
    )
    with torch.no_grad():
        steps = []
        for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
            steps.append(module(part, inference_params=params))
            params.seqlen_offset += part.shape[1]
        near(torch.cat(steps, 1), module(x), rtol=1e-4, atol=1e-5)


def test_mha_with_padding_and_packed() -> None:
    keep = torch.ones(B, S, dtype=torch.bool)
    keep[1, 8:] = False
    x = torch.randn(B, S, HQ * D)
    padded = mha.MHA(HQ * D, HQ, causal=True)
    packed = mha.MHA(HQ * D, HQ, causal=True, use_flash_attn=True)
    packed.load_state_dict(padded.state_dict())
    rows, indices, cu, longest, _ = bert_padding.unpad_input(x, keep)
    near(packed(rows, cu_seqlens=cu, max_seqlen=longest), padded(x, key_padding_mask=keep).flatten(0, 1)[indices],
         rtol=1e-4, atol=1e-5)  # fmt: skip
    with pytest.raises(ValueError, match="key_padding_mask needs use_flash_attn=False"):
        packed(x, key_padding_mask=keep)
    with pytest.raises(ValueError, match="use_alibi and window_size need use_flash_attn=True"):
        mha.MHA(HQ * D, HQ, use_alibi=True)


def test_unpad_rows_of_several_sequences() -> None:
    hidden = torch.randn(2, 6, 5, requires_grad=True)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu, longest = bert_padding.unpad_input_for_concatenated_sequences(hidden, lengths)
    assert cu.tolist() == [0, 2, 5, 11] and cu.dtype is torch.int32 and longest == 6
    assert torch.equal(packed, torch.cat([hidden[0, :5], hidden[1]]))
    assert torch.equal(bert_padding.index_put_first_axis(packed, indices, 12).view(2, 6, 5)[0, 5], torch.zeros(5))
    assert torch.equal(bert_padding.index_first_axis(hidden.flatten(0, 1), indices), packed)


def test_a_block_table_that_is_too_short() -> None:
    q, cache = torch.randn(1, 1, 2, D), torch.randn(4, 8, 2, D)
    table = torch.zeros(1, 1, dtype=torch.int32)
    for error in (RuntimeError, ValueError):  # flash_attn's and ours
        with pytest.raises(error, match="block_table names 1 pages of 8"):
            flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=9, block_table=table)


PROGRAM = """
from foveate.integrations import flash_attn as ours
ours.install()
import flash_attn, flash_attn_interface
from flash_attn import flash_attn_func
from flash_attn.bert_padding import unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_func, _flash_attn_forward
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.layer_norm import DropoutAddLayerNorm
from flash_attn.ops.triton.layer_norm import RMSNorm
from flash_attn.modules.mha import MHA
from flash_attn_interface import flash_attn_with_kvcache
assert flash_attn is ours and flash_attn_func is ours.flash_attn_func
assert int(flash_attn.__version__.split(".")[0]) == 2
ours.uninstall()
import sys
assert "flash_attn" not in sys.modules and "flash_attn.layers.rotary" not in sys.modules
import types
sys.modules["flash_attn"] = another = types.ModuleType("flash_attn")
try:
    ours.install()
except RuntimeError as error:
    assert "another flash_attn has been imported" in str(error)
else:
    raise AssertionError("it replaced another package unasked")
ours.install(replace=True)
assert sys.modules["flash_attn"] is ours
ours.uninstall()
assert sys.modules["flash_attn"] is another
"""


def test_unmodified_programs_import_it() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=120)
