"""foveate.nn.MultiheadAttention equals torch.nn.MultiheadAttention: state dict, every constructor option, every forward option."""

from __future__ import annotations

import pytest
import torch

import foveate

L, S, N, E, H = 7, 9, 3, 24, 4


def pair(**options):
    ours = foveate.nn.MultiheadAttention(E, H, **options)
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)  # the biases start at zero, which would hide them
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(options, batched=True, self_attention=False):
    shapes = [(L, N, E), (S, N, options.get("kdim") or E), (S, N, options.get("vdim") or E)]
    xs = [torch.randn(shape) for shape in shapes]
    if self_attention:
        xs = [torch.randn(S, N, E)] * 3
    if not batched:
        return [x[:, 0] for x in xs]
    return [x.transpose(0, 1) for x in xs] if options.get("batch_first") else xs


def check(ours, theirs, xs, **options):
    torch.manual_seed(1)
    out, weights = ours(*xs, **options)
    torch.manual_seed(1)
    # The hint must change nothing. With it torch leaves out the mask, and forgets the keys of add_bias_kv and add_zero_attn.
    expected, expected_weights = theirs(*xs, **{**options, "is_causal": False})
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(out)
    grads = [torch.autograd.grad(y, list(m.parameters()), direction) for y, m in ((out, ours), (expected, theirs))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


CONSTRUCTORS = {
    "default": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim vdim": {"kdim": 10, "vdim": 12},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10},
}
padding = torch.zeros(N, S, dtype=torch.bool)
padding[0, 5:] = padding[2, :2] = True
FORWARDS = {
    "plain": {},
    "padding": {"key_padding_mask": padding},
    "float padding": {"key_padding_mask": torch.randn(N, S)},
    "2-D mask": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(2)},
    "float 2-D mask": {"attn_mask": torch.randn(L, S)},
    "3-D mask": {"attn_mask": torch.randn(N * H, L, S)},
    "padding and mask": {"key_padding_mask": padding, "attn_mask": torch.ones(L, S, dtype=torch.bool).triu(4)},
    "padding and 3-D mask": {"key_padding_mask": torch.randn(N, S), "attn_mask": torch.randn(N * H, L, S)},
    "causal": {"attn_mask": torch.ones(L, S, dtype=torch.bool).triu(1), "is_causal": True},
}


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("constructor", CONSTRUCTORS)
def test_equals_torch(constructor, forward, need_weights):
    options = CONSTRUCTORS[constructor]
    check(*pair(**options), inputs(options), need_weights=need_weights, **FORWARDS[forward])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_unbatched_and_unaveraged(batch_first, average):
    options = {"batch_first": batch_first}
    mask = torch.randn(H, L, S)
    for batched in (True, False):
        check(*pair(**options), inputs(options, batched), average_attn_weights=average)
    check(*pair(**options), inputs(options, False), attn_mask=mask, key_padding_mask=padding[0].float())


def test_self_attention_uses_one_projection():
    check(*pair(), inputs({}, self_attention=True), need_weights=False)


def test_mixed_mask_kinds():
    """A bool mask and a float one; torch warns that this is deprecated, and adds -inf."""
    ours, theirs = pair()
    xs = inputs({})
    mask = torch.randn(L, S)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        expected, _ = theirs(*xs, key_padding_mask=padding, attn_mask=mask, need_weights=False)
    found, _ = ours(*xs, key_padding_mask=padding, attn_mask=mask, need_weights=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_computed_in_foveate_only_when_asked():
    ours, _ = pair()
    before = foveate.ops.attention.op.runs()
    ours(*inputs({}), need_weights=False)
    assert foveate.ops.attention.op.runs() == before + 1


def test_dropout_only_in_training():
    ours, theirs = pair(dropout=0.5)
    xs = inputs({})
    check(ours, theirs, xs, need_weights=True)  # the same draws of torch's generator
    out = ours(*xs, need_weights=False)[0]
    assert not torch.allclose(ours(*xs, need_weights=False)[0], out)
    check(ours.eval(), theirs.eval(), xs, need_weights=False)


def test_rows_without_keys_are_zero():
    ours, _ = pair()
    nothing = padding.clone()
    nothing[1] = True
    for need_weights in (False, True):
        out, weights = ours(*inputs({}), key_padding_mask=nothing, need_weights=need_weights)
        torch.testing.assert_close(out[:, 1], ours.out_proj.bias.expand(L, E))
        if need_weights:
            assert not weights[1].any()


def test_state_dict_and_type():
    ours, theirs = pair(add_bias_kv=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert isinstance(ours, torch.nn.MultiheadAttention)


def test_inside_a_transformer_layer_and_compiled():
    layer = torch.nn.TransformerEncoderLayer(E, H, 32, dropout=0.0).train()
    x = torch.randn(L, N, E)
    expected = layer(x)
    ours = foveate.nn.MultiheadAttention(E, H)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    before = foveate.ops.attention.op.runs()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert foveate.ops.attention.op.runs() == before + 1
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


REFUSED = [
    ({"key_padding_mask": padding[:, :4]}, r"key_padding_mask has shape \[3, 4\], expected \[3, 9\]"),
    ({"attn_mask": torch.zeros(S, L)}, r"attn_mask has shape \[9, 7\], expected \[7, 9\] or \[12, 7, 9\]"),
    ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, "attn_mask has dtype torch.int64; it must be bool"),
    ({"is_causal": True}, "is_causal=True says what attn_mask is"),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_refuses_with_a_sentence(options, sentence):
    ours, _ = pair()
    with pytest.raises(ValueError, match=sentence):
        ours(*inputs({}), **options)


def test_refuses_wrong_shapes():
    ours, _ = pair()
    q, k, v = inputs({})
    with pytest.raises(ValueError, match="must all have three dimensions"):
        ours(q, k[:, 0], v)
    with pytest.raises(ValueError, match=r"have \(23, 24, 24\) features; this module has \(24, 24, 24\)"):
        ours(q[..., 1:], k, v)
    with pytest.raises(ValueError, match="must agree in length"):
        ours(q, k[1:], v)
    with pytest.raises(ValueError, match="takes no nested tensors"):
        ours(torch.nested.nested_tensor([torch.zeros(3, E)], layout=torch.jagged), k, v)
