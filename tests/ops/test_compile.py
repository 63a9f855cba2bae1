"""torch.compile(fullgraph=True): forward and backward equal eager, with dynamic shapes and options too."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

import foveate

pytestmark = [
    # torch's own: dynamo makes an instance of every autograd.Function, and looks at .grad of non-leaf inputs.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # inductor's import
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]

OPTIONS = ["plain", "causal window", "bias", "mask lengths", "table sinks", "softcap alibi lse"]


def call(name, q, k, v, bias, table, sinks):
    attention = foveate.attention
    if name == "causal window":
        return attention(q, k, v, causal=True, window=(3, None), scale=0.5)
    if name == "bias":
        return attention(q, k, v, bias=bias)
    if name == "mask lengths":
        return attention(q, k, v, mask=bias > 0, kv_lens=torch.tensor([5, 2]))
    if name == "table sinks":
        return attention(q, k, v, relative_bias=foveate.RelativeBias(table, max_distance=8), sinks=sinks)
    if name == "softcap alibi lse":
        out, lse = attention(q, k, v, softcap=3.0, alibi_slopes=sinks.detach().abs(), return_lse=True)
        return out + lse.transpose(1, 2)[..., None]
    return attention(q, k, v)


def leaves(Sq=5, Skv=7, requires_grad=True):
    shapes = (2, Sq, 4, 8), (2, Skv, 2, 8), (2, Skv, 2, 8), (1, 4, Sq, Skv), (8, 4), (4,)
    return [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]


def check(f, compiled, xs):
    expected, found = f(*xs), compiled(*xs)
    torch.testing.assert_close(found, expected)
    if not expected.requires_grad:
        return
    direction = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, xs, direction, allow_unused=True),
        torch.autograd.grad(expected, xs, direction, allow_unused=True),
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_equals_eager(name, requires_grad):
    def f(*xs):
        return call(name, *xs)

    runs = foveate.ops.attention.op.runs()
    check(f, torch.compile(f, fullgraph=True, backend="aot_eager"), leaves(requires_grad=requires_grad))
    assert foveate.ops.attention.op.runs() >= runs + 2


def test_dynamic_shapes_compile_once():
    """Other lengths run in the graphs of the first; that one call may take two attempts, to settle which floats are constants."""

    def f(*xs):
        return call("causal window", *xs)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    check(f, compiled, leaves(5, 7))
    graphs = counter.frame_count
    assert graphs > 0
    for Sq, Skv in ((9, 12), (20, 33), (33, 20)):
        check(f, compiled, leaves(Sq, Skv))
    assert counter.frame_count == graphs


def test_what_eager_calls_remember_compiles_nothing_again(monkeypatch):
    import torch.utils.flop_counter

    monkeypatch.setattr(
        torch.utils.flop_counter, "flop_registry", {}
    )  # to which the first eager call gives the formulas
    monkeypatch.setattr(foveate.ops.flops, "_registered", False)

    def f(*xs):
        out = call("bias", *xs)
        return foveate.rms_norm(foveate.softmax(out), None, 1e-6)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    xs = leaves()
    compiled(*xs)
    f(*xs)
    assert foveate.ops.flops._registered
    compiled(*xs)
    assert counter.frame_count == 1


def test_inductor():
    def f(q, k, v, bias, table, sinks):
        return foveate.attention(q * 2, k, v, causal=True, sinks=sinks).relu()

    check(f, torch.compile(f, fullgraph=True), leaves())


def test_varlen():
    cu_q, cu_k = torch.tensor([0, 4, 10]), torch.tensor([0, 9, 14])

    def f(q, k, v, bias, table, sinks):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return foveate.attention_varlen(q, k, v, cu_q, cu_k, 6, 9, causal=True, sinks=sinks)

    check(f, torch.compile(f, fullgraph=True, backend="aot_eager"), leaves())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)])
def test_sdpa(is_causal, lengths):
    def f(q, k, v, bias, table, sinks):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return foveate.sdpa(q, k, v, None if is_causal else bias, is_causal=is_causal, enable_gqa=True)

    check(f, torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True), leaves(*lengths))


def test_dropout_follows_the_seed():
    q, k, v, *_ = leaves(33, 33, requires_grad=False)
    compiled = torch.compile(lambda *x: foveate.attention(*x, dropout_p=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = compiled(q, k, v), compiled(q, k, v)
    torch.manual_seed(3)
    assert torch.equal(compiled(q, k, v), first)
    assert not torch.equal(first, second)


def test_autocast_inside():
    def f(*xs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return foveate.attention(*xs[:3])

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    xs = leaves()
    assert compiled(*xs).dtype == torch.bfloat16
    check(f, compiled, xs)


def test_wrong_input_names_the_cure_under_compile():
    q, k, v, *_ = leaves()
    with pytest.raises(Exception) as error:
        torch.compile(foveate.attention, fullgraph=True, backend="aot_eager")(q[:, :, :3], k, v)
    if "Observed exception" in str(error.value) and torch.__version__ < "2.7":
        pytest.skip("torch 2.6 hides the message of an error in a graph")
    assert "query heads must be a multiple" in str(error.value)
