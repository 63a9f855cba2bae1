"""foveate.sdpa against torch.nn.functional.scaled_dot_product_attention: values, gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import foveate
from compare import GRADIENT_FACTOR, assert_as_good_as_torch
from foveate.bench.tolerance import function_floors


def keep(*shape):
    mask = torch.rand(shape) > 0.3
    mask[..., 0, :] = False  # a row without keys
    return mask


D = 16
CASES = {
    "4-D": lambda: (((2, 4, 37, D), (2, 4, 53, D), (2, 4, 53, D)), {}),
    "3-D": lambda: (((4, 37, D), (4, 53, D), (4, 53, D)), {"attn_mask": keep(37, 53)}),
    "2-D": lambda: (((37, D), (53, D), (53, D)), {"is_causal": True}),
    "5-D": lambda: (((3, 2, 4, 37, D), (3, 2, 4, 53, D), (3, 2, 4, 53, D)), {"attn_mask": keep(3, 2, 1, 37, 53)}),
    "5-D broadcast mask": lambda: (((3, 2, 4, 37, D),) + ((3, 2, 4, 53, D),) * 2, {"attn_mask": keep(2, 1, 37, 53)}),
    "mixed ranks": lambda: (((2, 3, 37, D), (53, D), (3, 53, D)), {}),
    "batch of 1": lambda: (((1, 3, 37, D), (2, 3, 53, D), (2, 3, 53, D)), {"attn_mask": keep(2, 1, 1, 53)}),
    "heads of 1": lambda: (((2, 3, 37, D), (2, 1, 53, D), (2, 1, 53, D)), {}),
    "value heads of 1": lambda: (((2, 3, 37, D), (2, 3, 53, D), (2, 1, 53, D)), {}),
    "query heads of 1": lambda: (((2, 1, 37, D), (2, 3, 53, D), (2, 3, 53, D)), {}),
    "gqa": lambda: (((2, 6, 37, D), (2, 2, 53, D), (2, 2, 53, D)), {"enable_gqa": True, "is_causal": True}),
    "gqa, other value heads": lambda: (((2, 4, 37, D), (2, 2, 53, D), (2, 1, 53, D)), {"enable_gqa": True}),
    "value dim": lambda: (((2, 4, 37, D), (2, 4, 53, D), (2, 4, 53, 24)), {"scale": 0.7}),
    "causal, more keys": lambda: (((2, 4, 37, D), (2, 4, 53, D), (2, 4, 53, D)), {"is_causal": True}),
    "causal, fewer keys": lambda: (((2, 4, 53, D), (2, 4, 37, D), (2, 4, 37, D)), {"is_causal": True}),
    "causal, one query": lambda: (((2, 4, 1, D), (2, 4, 37, D), (2, 4, 37, D)), {"is_causal": True}),
    "bool mask": lambda: (((2, 4, 37, D), (2, 4, 53, D), (2, 4, 53, D)), {"attn_mask": keep(2, 4, 37, 53)}),
    "float mask": lambda: (((2, 4, 37, D), (2, 4, 53, D), (2, 4, 53, D)), {"attn_mask": torch.randn(4, 37, 53)}),
    "-inf mask": lambda: (
        ((2, 4, 37, D), (2, 4, 53, D), (2, 4, 53, D)),
        {"attn_mask": torch.zeros(37, 53).masked_fill(~keep(37, 53), float("-inf"))},
    ),
    "empty query": lambda: (((2, 4, 0, D), (2, 4, 53, D), (2, 4, 53, D)), {}),
    "empty keys": lambda: (((2, 4, 37, D), (2, 4, 0, D), (2, 4, 0, D)), {}),
}


def run(f, xs, options, dtype):
    """Output and gradients of f in dtype."""
    xs = [x.to(dtype).requires_grad_() for x in xs]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype).requires_grad_()
        options = {**options, "attn_mask": mask}
        xs.append(mask)
    out = f(*xs[:3], **options)
    torch.manual_seed(1)
    direction = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    return out.detach(), torch.autograd.grad(out, xs, direction)


def floors_of(xs, options, dtype):
    """The floors of torch's own function: of out, and of the gradients in the order of `run`."""
    mask = options.get("attn_mask")
    leaves = [*xs, mask] if mask is not None and mask.is_floating_point() else xs

    def function(*leaves):
        used = options | ({"attn_mask": leaves[3]} if len(leaves) > 3 else {})
        out, grads = run(F.scaled_dot_product_attention, leaves[:3], used, torch.float64)
        return [out, *grads]

    return function_floors(function, [x.double() for x in leaves], 53 + D, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name, dtype):
    shapes, options = CASES[name]()
    xs = [torch.randn(shape) for shape in shapes]
    out, grads = run(foveate.sdpa, xs, options, dtype)
    theirs, their_grads = run(F.scaled_dot_product_attention, xs, options, dtype)
    exact, exact_grads = run(F.scaled_dot_product_attention, xs, options, torch.float64)
    assert out.dtype == theirs.dtype and out.shape == theirs.shape
    floors = floors_of(xs, options, dtype)
    assert_as_good_as_torch(out, exact, theirs, floor=floors[0])
    for i, (a, b, c, floor) in enumerate(zip(grads, exact_grads, their_grads, floors[1:])):
        assert a.dtype == dtype
        assert_as_good_as_torch(a, b, c, GRADIENT_FACTOR, f"gradient {i}", floor=floor)


@pytest.mark.parametrize("name", CASES)
def test_equals_torch_in_fp64(name):
    """Of the same precision as what "exact" is elsewhere: equal up to the order of sums."""
    shapes, options = CASES[name]()
    xs = [torch.randn(shape) for shape in shapes]
    ours = run(foveate.sdpa, xs, options, torch.float64)
    torch.testing.assert_close(ours, run(F.scaled_dot_product_attention, xs, options, torch.float64))


def test_runs_on_foveate():
    q = torch.randn(2, 4, 9, 16)
    before = foveate.ops.attention.op.runs()
    foveate.sdpa(q, q, q)
    assert foveate.ops.attention.op.runs() == before + 1


def test_transposed_memory_layout():
    """The layout that models have: heads split off a projection, transposed."""
    q, k, v = (torch.randn(2, 9, 4, 16).transpose(1, 2) for _ in range(3))
    torch.testing.assert_close(foveate.sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_dropout_is_applied_as_given():
    q, k = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 64, 16)
    v = torch.ones(2, 4, 64, 16)
    torch.manual_seed(0)
    out = foveate.sdpa(q, k, v, dropout_p=0.5)
    assert out.std() > 0.05 and abs(out.mean() - 1) < 0.1  # the weights that stay are doubled
    torch.manual_seed(0)
    assert torch.equal(foveate.sdpa(q, k, v, dropout_p=0.5), out)


def test_autocast_casts_as_torch_does():
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    mask = torch.randn(9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert foveate.sdpa(q, k, v, mask).dtype == F.scaled_dot_product_attention(q, k, v, mask).dtype


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


REFUSED = {
    "attn_mask and is_causal=True exclude": lambda: foveate.sdpa(x(2, 4, 9, 8), x(2, 4, 9, 8), x(2, 4, 9, 8), x(9, 9), is_causal=True),
    r"attn_mask has dtype torch.float64; .*torch.float32": lambda: foveate.sdpa(*[x(2, 4, 9, 8)] * 3, x(9, 9, dtype=torch.float64)),
    r"attn_mask has dtype torch.int32": lambda: foveate.sdpa(*[x(2, 4, 9, 8)] * 3, x(9, 9, dtype=torch.int32)),
    r"attn_mask of shape \[3, 1, 9, 9\] does not broadcast": lambda: foveate.sdpa(*[x(2, 4, 9, 8)] * 3, x(3, 1, 9, 9)),
    r"attn_mask of shape \[1, 1, 9, 8\] does not broadcast": lambda: foveate.sdpa(*[x(2, 4, 9, 8)] * 3, x(9, 8)),
    r"leading dimensions .* must broadcast": lambda: foveate.sdpa(x(2, 4, 9, 8), x(3, 4, 9, 8), x(3, 4, 9, 8)),
    r"query has 4 heads, key 2 and value 2; without enable_gqa=True": lambda: foveate.sdpa(x(2, 4, 9, 8), *[x(2, 2, 9, 8)] * 2),
    r"query has 4 heads, key 3 and value 3; the last two must divide": lambda: foveate.sdpa(
        x(2, 4, 9, 8), *[x(2, 3, 9, 8)] * 2, enable_gqa=True
    ),
    r"key has shape \[8\]; it needs at least two": lambda: foveate.sdpa(x(9, 8), x(8), x(8)),
    r"head dims are 0 for query and key and 0 for value; attention takes 1 or more": lambda: foveate.sdpa(*[x(2, 4, 9, 0)] * 3),
    r"dropout_p=1.0 must be a probability in \[0, 1\)": lambda: foveate.sdpa(*[x(2, 4, 9, 8)] * 3, dropout_p=1.0),
    r"query, key and value have dtype torch.int64": lambda: foveate.sdpa(*[x(2, 4, 9, 8, dtype=torch.int64)] * 3),
    r"query, key and value have dtypes torch.float32": lambda: foveate.sdpa(x(2, 4, 9, 8), *[x(2, 4, 9, 8, dtype=torch.float16)] * 2),
    r"q is a nested tensor with 4 dimensions": lambda: foveate.sdpa(*[torch.nested.nested_tensor([x(4, 9, 8)], layout=torch.jagged)] * 3),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_refuses_with_a_sentence(sentence):
    with pytest.raises(ValueError, match=sentence):
        REFUSED[sentence]()


def test_refuses_what_is_no_tensor():
    with pytest.raises(TypeError, match=r"key must be a torch.Tensor, got ndarray"):
        foveate.sdpa(x(9, 8), x(9, 8).numpy(), x(9, 8))


@pytest.mark.parametrize(("Sq", "Skv"), [(7, 7), (4, 9), (9, 4)])
@pytest.mark.parametrize("corner", ["upper_left", "lower_right"])
@pytest.mark.filterwarnings("ignore:Lower right causal bias")
def test_causal_bias(corner, Sq, Skv):
    """torch.nn.attention.bias says which corner; a row of lower_right without a key gives 0 where torch gives NaN."""
    from torch.nn.attention import bias

    q, k, v = torch.randn(2, 4, Sq, 16), torch.randn(2, 4, Skv, 16), torch.randn(2, 4, Skv, 16)
    causal = getattr(bias, f"causal_{corner}")(Sq, Skv)
    keep = torch.ones(Sq, Skv, dtype=torch.bool).tril(0 if corner == "upper_left" else Skv - Sq)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), keep).nan_to_num()
    torch.testing.assert_close(foveate.sdpa(q, k, v, causal), expected.float(), rtol=1e-5, atol=1e-5)
    with foveate.drop_in.sdpa():
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, causal), expected.float(), rtol=1e-5, atol=1e-5
        )
    with pytest.raises(ValueError, match=r"CausalBias for \(3, 5\) queries and keys; query and key have"):
        foveate.sdpa(q, k, v, getattr(bias, f"causal_{corner}")(3, 5))
    with pytest.raises(ValueError, match="exclude each other"):
        foveate.sdpa(q, k, v, causal, is_causal=True)
