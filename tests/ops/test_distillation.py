"""linear_distillation: the definitions in fp64, gradients, chunks, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveate.ops import distillation
from foveate.ops.distillation import linear_distillation

CASES = [
    {}, {"temperature": 2.0, "softcap": 3.0}, {"kind": "reverse-kl", "temperature": 0.7}, {"kind": "jsd", "beta": 0.3, "softcap": 2.0},
    {"kind": "jsd", "beta": 0.5}, {"top_k": 4, "temperature": 1.5}, {"teacher_softcap": 1.0},
]  # fmt: skip


def tensors(dtype: torch.dtype = torch.float64, tokens: int = 23, vocab: int = 17) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (tokens, 5), "weight": (vocab, 5), "bias": (vocab,), "teacher_hidden": (tokens, 7), "teacher_weight": (vocab, 7),
        "teacher_bias": (vocab,),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def definition(x, kind="forward-kl", beta=0.5, temperature=1.0, top_k=0, softcap=None, teacher_softcap=None):
    z, y = x["hidden"] @ x["weight"].T + x["bias"], x["teacher_hidden"] @ x["teacher_weight"].T + x["teacher_bias"]
    z = softcap * torch.tanh(z / softcap) if softcap else z
    y = teacher_softcap * torch.tanh(y / teacher_softcap) if teacher_softcap else y
    p, q = F.log_softmax(z / temperature, -1), F.log_softmax(y / temperature, -1)
    if top_k:
        _, places = y.topk(top_k, -1)
        p, q = p.gather(-1, places), F.log_softmax(y.gather(-1, places) / temperature, -1)

    def kl(a, b):
        return (a.exp() * (a - b)).sum()

    if kind == "jsd":
        m = torch.log(beta * q.exp() + (1 - beta) * p.exp())
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    return kl(q, p) if kind == "forward-kl" else kl(p, q)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_and_gradients_are_the_definition_in_any_chunks(monkeypatch, options):
    monkeypatch.setattr(distillation, "_CHUNK_BYTES", 1)  # 16 tokens of 23
    exact = {name: t.requires_grad_(True) for name, t in tensors().items()}
    truth = definition(exact, **options)
    truth.backward()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        ours = {name: t.requires_grad_(True) for name, t in tensors(dtype).items()}
        found = linear_distillation(**ours, **options)
        (3 * found).backward()
        assert found.dtype is dtype and found.item() == pytest.approx(truth.item(), rel=tolerance)
        for name in ("hidden", "weight", "bias"):
            torch.testing.assert_close(
                ours[name].grad.double(), 3 * exact[name].grad, rtol=tolerance, atol=10 * tolerance
            )
        assert all(ours[name].grad is None for name in ours if name.startswith("teacher"))


@pytest.mark.parametrize("kind", distillation.KINDS)
def test_equal_models_have_no_divergence_and_half_precision_stays_near(kind):
    x = tensors(torch.float32)
    same = {"hidden": x["hidden"], "weight": x["weight"], "teacher_hidden": x["hidden"], "teacher_weight": x["weight"]}
    assert abs(float(linear_distillation(**same, kind=kind))) < 1e-5
    half = linear_distillation(**tensors(torch.bfloat16), kind=kind)
    assert half.dtype is torch.float32 and float(half) == pytest.approx(float(definition(tensors(), kind)), rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(linear_distillation(**x, kind=kind)) == float(half)


def test_a_frozen_head_and_no_gradients(monkeypatch):
    x = tensors(torch.float32)
    x["hidden"].requires_grad_(True)
    linear_distillation(**x).backward()
    assert x["hidden"].grad is not None and x["weight"].grad is None
    with torch.no_grad():
        assert not linear_distillation(**x).requires_grad


def test_the_logits_of_all_tokens_are_never_there(monkeypatch):
    """The largest tensor that is made has a chunk's rows, not all tokens."""
    monkeypatch.setattr(distillation, "_CHUNK_BYTES", 1)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    x = tensors(torch.float32, tokens=400, vocab=300)
    for name in ("hidden", "weight"):
        x[name].requires_grad_(True)
    with Watch():
        loss = linear_distillation(**x, kind="jsd")
    loss.backward()
    assert largest <= 16 * 300 + 16 < 400 * 300


@pytest.mark.parametrize("changes, sentence", [
    ({"kind": "kl"}, "kind='kl' is not one of forward-kl, reverse-kl, jsd"), ({"temperature": 0.0}, "temperature=0.0 must be more than 0"),
    ({"kind": "jsd", "beta": 1.0}, "beta=1.0 must be between 0 and 1"), ({"kind": "jsd", "top_k": 3}, "top_k=3 must be 0, or 1 or more"),
    ({"teacher_weight": torch.zeros(3, 7)}, r"got \(23, 5\), \(17, 5\), \(23, 7\), \(3, 7\)"),
])  # fmt: skip
def test_what_cannot_be_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        linear_distillation(**tensors(torch.float32) | changes)
