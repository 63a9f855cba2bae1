"""Lengths, tables and targets on a GPU are not checked by the host: whatever they hold, the Triton kernels stay inside the tensors.

The launches are called below the checks of the public functions. Around what they may read lies NaN, around what they may write canaries.
"""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.ops.attention import with_kv_cache_op as kv_cache_op
from foveate.ops.attention.cache_operands import CacheOperands
from foveate.ops.attention.operands import Operands
from foveate.ops.cross_entropy import logits as logits_op
from kv_cases import BF16, I8, KvCase, bits, make_kv_inputs

if foveate.backends()["triton"] is not None:
    pytest.skip(f"triton: {foveate.backends()['triton']}", allow_module_level=True)

from foveate.backend.triton import attention_launch as launches
from foveate.backend.triton.decode_launch import attention_with_kv_cache as decode

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]

FAR = 2**20  # small enough that a stray read of the interpreter lands in memory of the buffers below or close by
ROWS = 40  # of NaN before and after each tensor


@pytest.fixture(autouse=True)
def _on_the_device(device):
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


class Fenced:
    """Tensors inside larger ones of NaN."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        buffer = torch.full((x.shape[0] + 2 * ROWS, *x.shape[1:]), float("nan"), dtype=x.dtype)
        self.buffers.append(buffer)
        inner = buffer[ROWS:-ROWS]
        return inner.copy_(x)

    def intact(self) -> bool:
        return all(bool(b[:ROWS].isnan().all() and b[-ROWS:].isnan().all()) for b in self.buffers)


def operands(q, k, v, **lengths) -> Operands:
    none = dict.fromkeys(Operands._fields)
    sizes = {"max_q": q.shape[1] if q.dim() == 4 else 6, "max_k": k.shape[1] if k.dim() == 4 else 9}
    options = {
        "causal": True,
        "window_left": -1,
        "window_right": -1,
        "scale": 0.3,
        "softcap": 0.0,
        "rel_bidirectional": True,
    }
    more = {"rel_max_distance": 0, "dropout_p": 0.0, "backend": "triton"}
    return Operands(**none | {"q": q, "k": k, "v": v} | sizes | options | more | lengths)


def both_passes(c: Operands, fenced: Fenced) -> list[torch.Tensor]:
    out, lse = fenced(torch.zeros_like(c.q)), torch.zeros(c.q.movedim(-2, -3 if c.q.dim() == 3 else 1).shape[:-1])
    launches.forward(c, out, lse)
    grads = (*(fenced(torch.zeros_like(x)) for x in (c.q, c.k, c.v)), *(torch.zeros(0) for _ in range(3)))
    wanted = (True, True, True, False, False, False)
    found = launches.backward(fenced(torch.ones_like(out)), None, out, lse, c, wanted, grads)
    assert fenced.intact()
    return [out, lse, *found[:3]]


@pytest.mark.parametrize(("bad", "meant"), [(FAR, 9), (10, 9), (-1, 0), (-FAR, 0)])
def test_kv_lens(bad, meant):
    """They are cut off at 0 and at the number of keys."""
    fenced = Fenced()
    q, k, v = (fenced(torch.randn(2, s, 2, 16)) for s in (6, 9, 9))
    found, expected = (
        both_passes(operands(q, k, v, kv_lens=torch.tensor([5, n], dtype=torch.int32)), fenced) for n in (bad, meant)
    )
    for a, b in zip(found, expected):
        assert torch.equal(a, b) and not a.isnan().any()


@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [([0, 5, FAR], [0, 9, 18]), ([0, 5, 11], [0, 9, FAR]), ([0, 11, 5], [0, 18, 9]), ([-FAR, 5, 11], [-3, 9, 18]),
     ([5, FAR, -FAR], [18, 20, 0]), ([0, 11, 11], [0, 18, 18])],
)  # fmt: skip
def test_cu_seqlens(cu_q, cu_k):
    """Sequences that leave the tensors, run backwards or are longer than announced."""
    fenced = Fenced()
    q, k, v = (fenced(torch.randn(s, 2, 16)) for s in (11, 18, 18))
    for found in both_passes(operands(q, k, v, cu_q=torch.tensor(cu_q), cu_k=torch.tensor(cu_k)), fenced):
        assert not found.isnan().any()


CACHES = [KvCase(), KvCase(page_size=8), KvCase(page_size=8, dtype=BF16, storage=I8), KvCase(page_size=8, rotary=8)]


def run_decode(inputs, fenced: Fenced) -> torch.Tensor:
    """The launch with both caches fenced, without the checks of the op."""
    o = dict(inputs.options)
    caches = [fenced(x) if x.is_floating_point() else x for x in (inputs.k_cache, inputs.v_cache)]
    out, lse = kv_cache_op._empty_outputs(inputs.q, inputs.v_cache)
    operands = CacheOperands(
        inputs.q, *caches, o.get("k"), o.get("v"), o["kv_lens"], o["block_table"], o.get("rotary_cos"), o.get("rotary_sin"),
        scale=0.3, k_scale=o["k_scale"], v_scale=o["v_scale"],
    )  # fmt: skip
    decode(operands, out, lse)
    assert fenced.intact()
    inputs.k_cache.copy_(caches[0]), inputs.v_cache.copy_(caches[1])
    return out


@pytest.mark.parametrize("bad", [FAR, 94, -1, -FAR])
@pytest.mark.parametrize("case", CACHES, ids=lambda case: case.id)
def test_lengths_of_a_cache(case, bad, seed):
    """The other sequence gets its result; nothing is written where there is no room."""
    inputs = make_kv_inputs(case, seed)
    wrong = inputs.clone()
    wrong.options["kv_lens"][0] = bad
    expected, found = run_decode(inputs, Fenced()), run_decode(wrong, Fenced())
    assert torch.equal(found[1], expected[1])
    assert not found.isnan().any()


@pytest.mark.parametrize("bad", [FAR, 10**6, -1, -FAR])
@pytest.mark.parametrize("case", CACHES[1:], ids=lambda case: case.id)
def test_pages_that_the_cache_does_not_have(case, bad, seed):
    """Their keys are not seen and not written: attention is over the others."""
    inputs = make_kv_inputs(case, seed)
    wrong = inputs.clone()
    wrong.options["block_table"][0] = bad
    before = bits(wrong.k_cache)
    expected, found = run_decode(inputs, Fenced()), run_decode(wrong, Fenced())
    assert torch.equal(found[1], expected[1])
    assert found[0].eq(0).all(), "no key is left"
    pages = set(inputs.options["block_table"][1].tolist())
    others = [p for p in range(len(wrong.k_cache)) if p not in pages]
    assert torch.equal(bits(wrong.k_cache)[others], before[others])


def test_positions_that_the_tables_do_not_have(seed):
    inputs = make_kv_inputs(KvCase(rotary=8), seed)
    for name in ("rotary_cos", "rotary_sin"):
        inputs.options[name] = Fenced()(inputs.options[name])[:50]  # the first sequence is longer
    assert not run_decode(inputs, Fenced()).isnan().any()


@pytest.mark.parametrize("bad", [FAR, 5, -1, -FAR])
def test_targets(bad, monkeypatch):
    """The loss and the gradient of such a row are NaN, those of the others what they are."""
    from foveate.backend.triton import cross_entropy

    monkeypatch.setattr(cross_entropy, "_check_target", lambda *_: None)
    logits = Fenced()(torch.randn(3, 5))
    target, options = torch.tensor([0, bad, 4]), (-100, 0.1, 0.01, 3.0)
    loss, stats = logits_op.forward(logits, target, *options, "triton")
    grad = logits_op.backward(torch.ones(3), logits, target, stats, *options, "triton")
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, False]
    assert grad[[0, 2]].isfinite().all()
