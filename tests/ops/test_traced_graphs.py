"""Numbers that torch.compile makes symbolic, torch.jit.trace, torch.export and AOTInductor: other sizes and values give eager's results."""

from __future__ import annotations

import io
import warnings

import pytest
import torch

import foveate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

WEIGHT, TABLE = torch.randn(9, 16), torch.randn(8, 2)
ANGLES = torch.randn(20, 4)
TARGET = torch.randint(0, 9, (6,))


def heads(x):
    return x.unflatten(-1, (2, 8))


def cache_call(x, **options):
    cache = torch.ones(1, 12, 2, 8).cumsum(1)
    return foveate.attention_with_kv_cache(heads(x)[:1], cache, cache, kv_lens=torch.tensor([11]), **options)


NUMBERS = {
    "attention scale": lambda x, n: foveate.attention(heads(x), heads(x), heads(x), scale=n),
    "attention softcap": lambda x, n: foveate.attention(heads(x), heads(x), heads(x), softcap=n),
    "cache scale": lambda x, n: cache_call(x, scale=n),
    "softmax scale": lambda x, n: foveate.softmax(x, scale=n),
    "cross_entropy label_smoothing": lambda x, n: foveate.cross_entropy(x, x.argmin(-1), label_smoothing=n),
    "cross_entropy z_loss": lambda x, n: foveate.cross_entropy(x, x.argmin(-1), z_loss=n),
    "linear_cross_entropy softcap": lambda x, n: foveate.linear_cross_entropy(x, WEIGHT, x.argmin(-1) % 9, softcap=n),
    "rms_norm eps": lambda x, n: foveate.rms_norm(x, None, n),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change_from_call_to_call(name):
    torch.compiler.reset()
    f, x = NUMBERS[name], torch.randn(2, 5, 16)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for n in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(x, n), f(x, n))


@pytest.mark.parametrize("name", ["attention scale", "softmax scale"])
def test_a_scale_by_length_needs_no_graph_for_each_length(name):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = NUMBERS[name]
    compiled = torch.compile(lambda x: f(x, x.shape[1] ** -0.5), fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for length in (5, 9, 17, 33):
        x, y = (t.requires_grad_() for t in torch.randn(1, 2, length, 16).expand(2, -1, -1, -1).clone())
        out, want = compiled(x), f(y, length**-0.5)
        torch.testing.assert_close(out, want)
        out.square().sum().backward()
        want.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[0]


TRACED = {
    "causal": lambda x: foveate.attention(heads(x), heads(x), heads(x), causal=True, return_lse=True)[0],
    "T5's bias": lambda x: foveate.attention(
        heads(x), heads(x), heads(x), relative_bias=foveate.RelativeBias(TABLE, max_distance=6)
    ),
    "few queries": lambda x: foveate.attention(heads(x)[:, -1:], heads(x), heads(x)),
    "sdpa, more queries than keys": lambda x: foveate.sdpa(x[:, None], x[:, None, :3], x[:, None, :3], is_causal=True),
    "sdpa, square": lambda x: foveate.sdpa(x[:, None], x[:, None], x[:, None], is_causal=True),
    "cache": cache_call,
    "softmax": lambda x: foveate.softmax(x, 1, scale=0.3),
    "rms_norm": lambda x: foveate.rms_norm(x, WEIGHT[0], 1e-6),
    "rotary": lambda x: foveate.apply_rotary(heads(x), heads(x), ANGLES[: x.shape[1]], ANGLES[: x.shape[1]])[0],
    "linear_cross_entropy": lambda x: foveate.linear_cross_entropy(x, WEIGHT, x.argmin(-1) % 9),
}


@pytest.mark.parametrize("name", TRACED)
def test_a_trace_is_saved_and_runs_at_another_size(name):
    f, x, other = TRACED[name], torch.randn(1, 5, 16), torch.randn(1, 11, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about every comparison of sizes
        traced = torch.jit.trace(f, (x,), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(other), f(other))


@pytest.mark.parametrize("heads_of_the_call", [None, [0, 3]])
def test_attention_weights_are_exported_with_dynamic_lengths(heads_of_the_call):
    class Weights(torch.nn.Module):
        def forward(self, q, k):
            return foveate.attention_weights(q, k, rows=[0, -1], heads=heads_of_the_call, causal=True)

    def inputs(B, S):
        return torch.randn(B, S, 4, 8), torch.randn(B, S + 1, 2, 8)

    auto = torch.export.Dim.AUTO
    dynamic = dict.fromkeys(range(4), auto)
    graph = torch.export.export(Weights(), inputs(2, 6), dynamic_shapes=(dynamic, dynamic)).module()
    other = inputs(3, 9)
    torch.testing.assert_close(graph(*other), Weights()(*other))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    class Net(torch.nn.Module):
        def forward(self, x):
            q, k, v = foveate.rms_norm(x, None, 1e-6).unflatten(-1, (3, 2, 8)).unbind(2)
            return foveate.softmax(foveate.attention(q, k, v, causal=True, scale=0.5).flatten(2), scale=2.0)

    if not hasattr(torch._inductor, "aoti_compile_and_package"):
        pytest.skip("this torch does not package")
    x = torch.randn(2, 7, 48)
    path = str(tmp_path / "net.pt2")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._inductor.aoti_compile_and_package(torch.export.export(Net(), (x,)), package_path=path)
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(x), Net()(x))
