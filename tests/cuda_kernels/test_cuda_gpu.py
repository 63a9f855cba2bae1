"""What only a GPU can show of the CUDA kernels: streams, graphs, repeats, compiled graphs. benchmarks/gpu.sh runs it."""

from __future__ import annotations

import pytest
import torch

import foveate
from cases import AttentionCase, make_inputs

pytestmark = [pytest.mark.device, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    return [torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return foveate.attention(q, k, v, causal=True, deterministic=True, backend="native")


def gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = attention(q, k, v)
    return torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def test_the_backward_gives_the_same_bits_a_thousand_times(qkv):
    first = gradients(*qkv)
    for _ in range(1000):
        for grad, expected in zip(gradients(*qkv), first):
            assert torch.equal(grad, expected)


def test_launches_go_to_the_current_stream(qkv):
    """The inputs come late on a stream of their own; a kernel on another stream would read what was there before."""
    expected = attention(*qkv).detach()
    late, stream = [torch.zeros_like(x, requires_grad=False) for x in qkv], torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for empty, x in zip(late, qkv):
            empty.copy_(x.detach())
        out = attention(*late)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_a_graph_replays_attention_and_a_decode_step():
    k_cache, v_cache = (torch.zeros(64, 16, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q, k, v = (torch.randn(4, 1, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    table = torch.arange(64, device="cuda", dtype=torch.int32).view(4, 16)
    lens = torch.tensor([0, 5, 31, 200], device="cuda", dtype=torch.int32)

    def step() -> torch.Tensor:
        return foveate.attention_with_kv_cache(
            q, k_cache, v_cache, k=k, v=v, kv_lens=lens, block_table=table, backend="native"
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for length in (1, 40):
        lens.fill_(length)
        q.normal_()
        graph.replay()
        assert torch.equal(out, step())


def test_compiled_is_eager(qkv):
    expected = gradients(*qkv)
    out = torch.compile(attention, fullgraph=True)(*qkv)
    for grad, value in zip(torch.autograd.grad(out, qkv, torch.ones_like(out)), expected):
        assert torch.equal(grad, value)


SANITIZED = [
    AttentionCase(b=2, sq=37, skv=70, hkv=2, d=64, dtype=torch.bfloat16, causal=True, kv_lens=True, bias="1h1k"),
    AttentionCase(b=1, sq=65, skv=63, d=40, dtype=torch.float16, window=(7, 3), dropout=0.2, sinks=True),
    AttentionCase(b=1, sq=19, skv=35, d=128, softcap=3.0),
]


@pytest.mark.parametrize("case", SANITIZED, ids=lambda case: case.id)
def test_sanitized(case, seed):
    """For compute-sanitizer, forward and backward once; results are compared elsewhere."""
    inputs = make_inputs(case, seed, "cuda").requires_grad()
    out, lse = inputs.run("native")
    (out.float().sum() + lse[lse.isfinite()].sum()).backward()
    assert out.isfinite().all()
