"""foveate.attention_weights: the definition's probabilities, those of transformers' eager attention, gradients, transforms, bad input."""

from __future__ import annotations

import pytest
import torch

import foveate
from cases import COMBINED, DTYPES, SINGLE_OPTION, AttentionCase
from compare import GRADIENT_FACTOR, assert_as_good_as_torch, torch_attention
from foveate.backend.reference import attention as reference
from foveate.bench.tolerance import attention_bound, function_floors
from poison import nan_beyond, nan_padded

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))
    for name, reason in foveate.backends().items()
]
OPTIONS = [case for case in (*SINGLE_OPTION, *COMBINED, *DTYPES) if not case.dropout]


def probabilities(inputs, attention=reference.attention):
    """[B, Hq, Sq, Skv] of an attention function: its result where the values are the unit vectors."""
    B, Skv, Hkv, _ = inputs.k.shape
    v = torch.eye(Skv, dtype=inputs.k.dtype)[None, :, None].expand(B, Skv, Hkv, Skv)
    return attention(inputs.q, inputs.k, v, **inputs.reference_options())[0].transpose(1, 2)


def weights(inputs, **more):
    options = inputs.options()
    del options["generator"]
    return foveate.attention_weights(inputs.q, inputs.k, **(options | more))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.id)
def test_equals_the_definition(case, backend):
    if backend == "triton" and case.dtype == torch.float64:
        pytest.skip("triton takes no float64")
    inputs = case.make_inputs(3)
    rows, heads = [0, case.sq // 2, -1], [case.hq - 1, 0]
    out = weights(inputs, rows=rows, heads=heads, backend=backend)
    exact = probabilities(inputs.to(torch.float64))
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    peer = probabilities(inputs.to(wide), torch_attention)
    q, k = inputs.q.to(wide), inputs.k.to(wide)
    eye = torch.eye(case.skv, dtype=wide)[None, :, None].expand(case.b, case.skv, case.hkv, case.skv)
    floor = attention_bound(q, k, eye, exact.to(wide), dtype=wide, scale=case.scale, bias=40.0).out
    assert out.dtype == wide
    assert_as_good_as_torch(out, exact[:, heads][:, :, rows], peer[:, heads][:, :, rows], floor=floor)


@pytest.mark.cuda
@pytest.mark.interpreted
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_the_definition(backend):
    case = AttentionCase(
        sq=5, skv=9, hkv=2, d=8, causal=True, softcap=2.0, bias="b1qk", mask="qk", sinks=True, relative="bidirectional"
    )
    inputs, rows = case.make_inputs(1), [4, 0, 2]
    direction = torch.randn(2, 4, 3, 9, dtype=torch.float64)

    def run(call, inputs):
        inputs = inputs.requires_grad()
        leaves = [x for name, x in inputs.leaves.items() if name != "v"]
        return torch.autograd.grad(call(inputs), leaves, direction.to(inputs.q.dtype))

    ours = run(lambda x: weights(x, rows=rows, backend=backend), inputs)
    exact = run(lambda x: probabilities(x)[:, :, rows], inputs.to(torch.float64))
    peer = run(lambda x: probabilities(x, torch_attention)[:, :, rows], inputs)

    def of_leaves(*leaves):
        names = [name for name in inputs.leaves if name != "v"]
        moved = inputs.to(torch.float64).replace(**dict(zip(names, leaves)))
        return run(lambda x: probabilities(x)[:, :, rows], moved)

    leaves = [x.double() for name, x in inputs.leaves.items() if name != "v"]
    floors = function_floors(of_leaves, leaves, 9 * 5, torch.float32)
    for a, b, c, floor in zip(ours, exact, peer, floors):
        assert_as_good_as_torch(a, b, c, GRADIENT_FACTOR, floor=floor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_beyond_kv_lens_is_not_seen(backend, dtype):
    inputs = AttentionCase(b=3, sq=6, skv=11, hkv=2, kv_lens=True, causal=True, dtype=dtype).make_inputs(0)
    clean = weights(inputs, rows=range(6), backend=backend)
    q, k = nan_padded(inputs.q).requires_grad_(), nan_padded(nan_beyond(inputs.k, inputs.kv_lens)).requires_grad_()
    poisoned = weights(inputs.replace(q=q, k=k), rows=range(6), backend=backend)
    assert torch.equal(poisoned, clean)
    assert inputs.kv_lens[1] == 0 and not poisoned[1].any()
    for b, length in enumerate(inputs.kv_lens.tolist()):
        assert not poisoned[b, ..., length:].any()
        seen = poisoned[b, :, -1, :length].sum(-1)
        torch.testing.assert_close(seen, torch.ones(4) if length else torch.zeros(4))
    gradients = torch.autograd.grad(poisoned.square().sum(), [q, k])
    assert all(g.isfinite().all() for g in gradients)


def test_rows_of_each_sequence_its_own():
    inputs = AttentionCase(sq=7, skv=9, hkv=2, bias="bhqk", mask="1hqk", causal=True, alibi="bh").make_inputs(2)
    every = weights(inputs, rows=range(7))
    rows = torch.tensor([[6, -7, 3], [1, 1, 4]])
    some = weights(inputs, rows=rows, heads=[2, 2, 0])
    for b in range(2):
        expected = every[b][[2, 2, 0]][:, (rows[b] % 7).tolist()]
        torch.testing.assert_close(some[b], expected, rtol=1e-5, atol=1e-7)
    # an int is one of them, and several batch entries share a list
    torch.testing.assert_close(weights(inputs, rows=-1, heads=3), every[:, 3:, 6:], rtol=1e-5, atol=1e-7)


def test_no_rows_no_heads_no_keys():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 2, 8)
    assert foveate.attention_weights(q, k, rows=[]).shape == (2, 4, 0, 5)
    assert foveate.attention_weights(q, k, rows=[1], heads=[]).shape == (2, 0, 1, 5)
    assert foveate.attention_weights(q, k[:, :0], rows=[1, 2]).shape == (2, 4, 2, 0)
    assert foveate.attention_weights(q[:0], k[:0], rows=[1]).shape == (0, 4, 1, 5)


def test_memory_is_that_of_the_rows():
    """32k keys: the scores of all queries would take 16 GiB."""
    S = 1 << 15
    q, k = torch.randn(1, S, 4, 8), torch.randn(1, S, 2, 8)
    out = foveate.attention_weights(q, k, rows=[0, S // 2, -1], causal=True)
    assert out.shape == (1, 4, 3, S)
    assert (out[0, :, 0, 0] == 1).all() and not out[0, :, 1, S // 2 + 1 :].any()
    torch.testing.assert_close(out.sum(-1), torch.ones(1, 4, 3))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's rules of forward mode
def test_transforms():
    q, k = torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 9, 2, 8)

    def f(q, k):
        return foveate.attention_weights(q, k, rows=[0, -1], heads=[1, 3], causal=True, window=(4, None))

    expected = f(q[0], k[0])
    mapped = torch.vmap(f)(q, k)
    torch.testing.assert_close(mapped[0], expected)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(q[0], k[0]), expected)
    assert f(q[0].to("meta"), k[0].to("meta")).shape == expected.shape
    mode = torch._subclasses.FakeTensorMode()
    fakes = [mode.from_tensor(x[0]) for x in (q, k)]
    with mode:
        fake = f(*fakes)
        assert fake.shape == expected.shape and fake.dtype == expected.dtype
    tangent = torch.func.jvp(lambda q: f(q, k[0]), (q[0],), (torch.ones_like(q[0]),))[1]
    step = 1e-6
    wide = [x[0].double() for x in (q, k)]
    difference = (f(wide[0] + step, wide[1]) - f(wide[0], wide[1])) / step
    torch.testing.assert_close(tangent.double(), difference, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert f(q[0], k[0]).dtype == torch.float32  # of q and k in bf16, multiplied in fp32
        torch.testing.assert_close(f(q[0], k[0]), f(q[0].bfloat16(), k[0].bfloat16()))


def test_gradcheck():
    q, k = (torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda q, k: foveate.attention_weights(q, k, rows=[2, 0], causal=True), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: foveate.attention_weights(q, k, rows=[1], softcap=2.0), (q, k))


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_equals_transformers_eager_attention(family):
    """output_attentions of transformers, and ours of the queries and keys that its own attention function is given."""
    transformers = pytest.importorskip("transformers")
    from transformers import AttentionInterface

    seen = []

    def watched(module, query, key, value, attention_mask, scaling=None, **options):
        mask = (
            None
            if attention_mask is None
            else attention_mask
            if attention_mask.dtype is torch.bool
            else attention_mask == 0
        )
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        seen.append((q, k, {"scale": scaling, "mask": mask, "causal": mask is None and family != "bert"}))
        return foveate.attention(q, k, v, **seen[-1][2]), None

    AttentionInterface.register("watched_by_foveate", watched)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=48),
        "bert": lambda: transformers.BertConfig(**sizes, intermediate_size=48),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4),
    }[family]()
    torch.manual_seed(0)
    kind = {"llama": "LlamaModel", "bert": "BertModel", "gpt2": "GPT2Model"}[family]
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    tokens = torch.randint(0, 99, (2, 13))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(tokens, output_attentions=True).attentions
        model.set_attn_implementation("watched_by_foveate")
        model(tokens)
    assert len(seen) == len(expected) == 2
    for (q, k, options), theirs in zip(seen, expected):
        ours = foveate.attention_weights(q, k, rows=[0, 5, -1], **options)
        torch.testing.assert_close(ours, theirs[:, :, [0, 5, 12]], rtol=1e-4, atol=1e-5)


def test_explain():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 9, 2, 8)
    found = foveate.explain(q, k, rows=[0], causal=True)
    assert found.chosen == "native" and found.forward["reference"] == "able"
    assert str(found).startswith("attention_weights on cpu, torch.float32, head dim 8, with causal")
    assert foveate.explain(q.to("meta"), k.to("meta"), rows=[0]).chosen == "reference"
    with pytest.raises(TypeError, match="missing a required argument: 'v'"):
        foveate.explain(q, k, causal=True)
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        foveate.explain(q, k, rows=[0], backend="cuda")


def test_bad_input():
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 9, 2, 8)
    for options, error, words in (
        ({"rows": [5]}, ValueError, "rows has 5; q has 5 queries, so rows go from -5 to 4"),
        ({"rows": torch.tensor([0, -6])}, ValueError, "rows has -6; q has 5 queries"),
        ({"rows": torch.zeros(3, 2, dtype=torch.long)}, ValueError, r"rows has shape \[3, 2\]; it must be \[R\]"),
        ({"rows": torch.ones(2)}, TypeError, "rows is torch.float32; it must have integers"),
        ({"rows": torch.tensor([True])}, TypeError, "rows is torch.bool"),
        ({"rows": "last"}, TypeError, "rows='last' must be integers"),
        ({"rows": [0.5]}, TypeError, "an entry of rows=0.5"),
        ({"rows": None}, TypeError, "an entry of rows=None"),
        ({"rows": [0], "heads": [4]}, ValueError, "heads has 4; q has 4 heads, so heads go from -4 to 3"),
        ({"rows": [0], "heads": torch.tensor([1])}, TypeError, "heads must be integers, got a tensor"),
        ({"rows": [0], "dropout_p": 0.1}, ValueError, "dropout_p=0.1: attention_weights gives .* before dropout"),
        ({"rows": [0], "kv_lens": torch.tensor([3, 10])}, ValueError, r"kv_lens\[1\] = 10 is outside 0..9"),
        ({"rows": [0], "mask": torch.ones(1, 9)}, ValueError, "mask has dtype torch.float32"),
        ({"rows": [0], "bias": torch.ones(1, 5)}, ValueError, "bias of shape .* does not broadcast"),
        ({"rows": [0], "backend": "fast"}, ValueError, "backend='fast' is unknown"),
    ):
        with pytest.raises(error, match=words):
            foveate.attention_weights(q, k, **options)
    with pytest.raises(ValueError, match="q has head dim 8 and k has 4"):
        foveate.attention_weights(q, k[..., :4], rows=[0])
    wide = q.double(), k.double()  # which Triton's kernels do not take
    with pytest.raises(
        foveate.UnsupportedError, match="'triton' cannot serve attention_weights.* can: native, reference"
    ):
        foveate.attention_weights(*wide, rows=[0], backend="triton")


def test_every_field_of_a_case_is_an_option():
    """A new option of attention has to be one here, too."""
    import inspect

    known = set(inspect.signature(foveate.attention).parameters)
    ours = set(inspect.signature(foveate.attention_weights).parameters)
    of_values = {"v", "generator", "deterministic", "return_lse", "score_mod", "score_mod_bwd", "score_mod_aux"}
    assert known - ours == of_values and ours - known == {"rows", "heads"}
