"""torch.utils.flop_counter over foveate's ops: what torch's own formulas give for the same work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import foveate


def count(f):
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


@pytest.mark.parametrize("Dv", [16, 24])
def test_attention_counts_what_the_matrix_products_of_torch_do(Dv):
    q, k, v = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 4, 16), torch.randn(2, 7, 4, Dv)
    transposed = [x.transpose(1, 2) for x in (q, k, v)]

    def torchs():
        with sdpa_kernel(SDPBackend.MATH):
            F.scaled_dot_product_attention(*transposed)

    want = count(torchs)
    assert want > 0
    assert count(lambda: foveate.attention(q, k, v, causal=True)) == want
    assert count(lambda: foveate.attention(q, k, v, backend="reference")) == want
    with foveate.drop_in.sdpa():
        assert count(lambda: F.scaled_dot_product_attention(*transposed)) == want


def test_grouped_heads_count_each_query_head():
    q, k = torch.randn(1, 5, 6, 8), torch.randn(1, 7, 2, 8)
    assert count(lambda: foveate.attention(q, k, k)) == 4 * 5 * 7 * 6 * 8


def test_backward_computes_the_scores_again():
    q, k, v = (torch.randn(1, n, 2, d, requires_grad=True) for n, d in ((5, 16), (7, 16), (7, 8)))
    forward = 2 * 2 * 5 * 7 * (16 + 8)
    assert count(lambda: foveate.attention(q, k, v).sum().backward()) == forward + 2 * 2 * 5 * 7 * (3 * 16 + 2 * 8)


def test_packed_sequences_count_their_own_keys():
    q, k = torch.randn(9, 2, 8), torch.randn(12, 2, 8)
    cu_q, cu_k = torch.tensor([0, 4, 9]), torch.tensor([0, 10, 12])
    assert count(lambda: foveate.attention_varlen(q, k, k, cu_q, cu_k, 5, 10)) == 4 * 2 * 8 * (4 * 10 + 5 * 2)


def test_a_cache_counts_the_keys_that_are_there():
    q, cache, new = torch.randn(2, 1, 4, 8), torch.zeros(2, 32, 2, 8), torch.randn(2, 1, 2, 8)
    lens = torch.tensor([3, 11])
    f = lambda: foveate.attention_with_kv_cache(q, cache, cache.clone(), k=new, v=new, kv_lens=lens)  # noqa: E731
    assert count(f) == 4 * 4 * 8 * (4 + 12)


def test_linear_cross_entropy_and_packed_linear():
    hidden, weight, target = torch.randn(3, 5, 16), torch.randn(50, 16), torch.randint(0, 50, (3, 5))
    want = count(lambda: hidden @ weight.T)
    assert count(lambda: foveate.linear_cross_entropy(hidden, weight, target)) == want
    leaf = hidden.clone().requires_grad_()
    assert count(lambda: foveate.linear_cross_entropy(leaf, weight, target).backward()) == 2 * want
    packed = foveate.nn.PackedLinear.from_linear(torch.nn.Linear(64, 32, bias=False), format="q8_0")
    assert count(lambda: packed(torch.randn(3, 64))) == 2 * 3 * 64 * 32


def test_a_counter_that_was_active_before_the_first_call(monkeypatch):
    """The formulas are registered when an op first runs beside torch's counter, which then has its own copy of the table."""
    from torch.utils import flop_counter

    without = {op: formula for op, formula in flop_counter.flop_registry.items() if "foveate" not in str(op)}
    monkeypatch.setattr(flop_counter, "flop_registry", without)
    monkeypatch.setattr(foveate.ops.flops, "_registered", False)
    x = torch.randn(1, 4, 2, 8)
    assert count(lambda: foveate.attention(x, x, x)) == 4 * 4 * 4 * 2 * 8
