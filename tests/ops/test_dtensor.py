"""DTensors over two processes: values and gradients as without them, sharded results, and nothing communicated in the forward pass."""

from __future__ import annotations

import torch

import foveate
from ranks import needs_gloo, run_ranks

pytestmark = needs_gloo


def _cases():
    """name: (function of leaves, leaves, dimensions of each leaf for each sharding: None is replicated, dimension of the result)."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    q, k = randn(2, 5, 4, 8), randn(2, 7, 2, 8)
    bias, sinks, table = randn(1, 4, 5, 7), randn(4), randn(8, 4)
    packed, cu = randn(9, 4, 8), torch.tensor([0, 4, 9])
    x, weight, target = randn(2, 4, 6), randn(6), torch.randint(0, 6, (2, 4), generator=generator)
    angles = randn(5, 4)
    heads, batch = ((2, 2, 2), 2), ((0, 0, 0), 0)
    return {
        "attention": (lambda q, k, v: foveate.attention(q, k, v, causal=True), (q, k, randn(2, 7, 2, 8)), [heads, batch]),
        "attention, more": (
            lambda q, k, b, s, t: foveate.attention(
                q, k, k, bias=b, sinks=s, relative_bias=foveate.RelativeBias(t, max_distance=6), return_lse=True
            )[0],
            (q, k, bias, sinks, table),
            [((2, 2, 1, 0, 1), 2), ((0, 0, None, None, None), 0)],
        ),
        "varlen": (
            lambda q, c: foveate.attention_varlen(q, q, q, c, c, 5, 5), (packed, cu), [((1, None), 1)],
        ),
        "sdpa": (lambda q: foveate.sdpa(q, q, q, is_causal=True), (randn(2, 4, 5, 8),), [((1,), 1), ((0,), 0)]),
        "rms_norm": (lambda x, w: foveate.rms_norm(x, w, 1e-6), (x, weight), [((0, None), 0), ((1, None), 1)]),
        "softmax": (lambda x: foveate.softmax(x, scale=0.5), (x,), [((0,), 0), ((1,), 1)]),
        "softmax, causal": (lambda x: foveate.softmax(x, causal=True), (x,), [((0,), 0)]),
        "log_softmax": (foveate.log_softmax, (x,), [((1,), 1)]),
        "cross_entropy": (
            lambda x, t: foveate.cross_entropy(x, t, reduction="none"), (x, target), [((0, 0), 0), ((1, 1), 1)],
        ),
        "rotary": (
            lambda q, c: sum(foveate.apply_rotary(q, q, c, c)), (q, angles), [((2, None), 2), ((0, None), 0)],
        ),
        "swiglu": (lambda g, u: foveate.swiglu(g, u), (x, randn(2, 4, 6)), [((2, 2), 2), ((0, 0), 0)]),
    }  # fmt: skip


def rank_runs_all(rank: int) -> list[str]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.debug import CommDebugMode

    mesh, wrong = init_device_mesh("cpu", (2,)), []
    for name, (function, tensors, shardings) in _cases().items():
        learned = [
            (t.is_floating_point() and name != "rotary") or (name == "rotary" and i == 0) for i, t in enumerate(tensors)
        ]
        plain = [t.clone().requires_grad_(want) for t, want in zip(tensors, learned)]
        want = function(*plain)
        dout = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
        want.backward(dout)
        replicated = ((None,) * len(tensors), None)
        for dims, result in [*shardings, replicated]:
            places = [Replicate() if d is None else Shard(d) for d in dims]
            leaves = [
                distribute_tensor(t, mesh, [p]).requires_grad_(need) for t, p, need in zip(tensors, places, learned)
            ]
            with CommDebugMode() as communication:
                out = function(*leaves)
            where = Replicate() if result is None else Shard(result)
            if out.placements != (where,) or communication.get_total_counts():
                wrong.append(f"{name} {dims}: {out.placements}, {communication.get_total_counts()} messages")
            out.backward(distribute_tensor(dout, mesh, [where]))
            pairs = [(out, want), *((a.grad, b.grad) for a, b, need in zip(leaves, plain, learned) if need)]
            for i, (mine, other) in enumerate(pairs):
                error = (mine.full_tensor() - other).abs().max()
                if error > 1e-5 * (1 + other.abs().max()):
                    wrong.append(f"{name} {dims}: {'gradient' if i else 'out'} {i} off by {error:.1e}")
    if (refused := _refused(mesh)) != ["attention_weights", "linear_cross_entropy"]:
        wrong.append(f"refused are {refused}")
    return wrong


def _refused(mesh) -> list[str]:
    """The ops without a strategy, by the sentences of their refusals."""
    from torch.distributed.tensor import Shard, distribute_tensor

    q, h = (distribute_tensor(torch.randn(shape), mesh, [Shard(0)]) for shape in ((2, 3, 4, 8), (2, 8)))
    target = torch.zeros(2, dtype=torch.int64)
    refused = []
    for call in (
        lambda: foveate.attention_weights(q, q, rows=[0]),
        lambda: foveate.linear_cross_entropy(h, h, target),
    ):
        try:
            call()
        except foveate.UnsupportedError as error:
            refused.append(str(error).partition(" takes no DTensors: ")[0])
    return refused


def test_values_gradients_and_placements(tmp_path):
    assert run_ranks(rank_runs_all, 2, tmp_path) == [[], []]


def test_strategies_cover_the_ops_with_gradients():
    for name in foveate.ops.dtensor._RULES:
        assert hasattr(torch.ops.foveate, name)
