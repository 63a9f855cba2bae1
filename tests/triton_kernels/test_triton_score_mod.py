"""score_mod: options of attention written as functions give what the options give, forward and backward."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import compare
import foveate
from cases import AttentionCase, make_inputs

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def softcap(score, b, h, i, j, aux):
    e = tl.exp(score / 1.5)  # 3 * tanh(score / 3), which the interpreter lacks
    return 3.0 * (e - 1) / (e + 1)


@triton.jit
def softcap_bwd(score, grad, b, h, i, j, aux):
    e = tl.exp(score / 1.5)
    t = (e - 1) / (e + 1)
    return grad * (1 - t * t)


@triton.jit
def alibi(score, b, h, i, j, aux):
    """aux: the slopes [Hq], and Skv - Sq."""
    return score - tl.load(aux[0] + h) * tl.abs(i + tl.load(aux[1]) - j)


@triton.jit
def documents(score, b, h, i, j, aux):
    """aux: the document of each query and of each key."""
    return tl.where(tl.load(aux[0] + i) == tl.load(aux[1] + j), score, float("-inf"))


@triton.jit
def relative(score, b, h, i, j, aux):
    """aux: [Hq, distances], the row length, and the place of distance 0."""
    return score + tl.load(aux[0] + h * tl.load(aux[1]) + (j - i + tl.load(aux[2])))


@triton.jit
def same(score, grad, b, h, i, j, aux):
    return grad


@triton.jit
def log_mask(score, b, h, i, j, aux):
    return tl.where(i < j, float("-inf"), score)


@triton.jit
def log_mask_bwd(score, grad, b, h, i, j, aux):
    return grad * tl.where(i < j, float("inf"), 1.0)


def twins(case: AttentionCase, seed: int, device: str):
    """The inputs, the option and the score_mod that mean the same."""
    inputs = make_inputs(case, seed, device)
    place = {"device": device}
    hq, shift = case.hq, torch.tensor([case.skv - case.sq], **place)
    slopes = torch.rand(hq, **place)
    rows, columns = torch.arange(case.sq, **place) // 7, torch.arange(case.skv, **place) // 9
    table = torch.randn(hq, case.sq + case.skv, **place)
    distance = torch.arange(case.skv, **place) - torch.arange(case.sq, **place)[:, None] + case.sq
    sizes = torch.tensor(table.shape[1], **place), torch.tensor(case.sq, **place)
    return inputs, {
        "softcap": ({"softcap": 3.0}, (softcap, softcap_bwd, ())),
        "alibi": ({"alibi_slopes": slopes}, (alibi, same, (slopes, shift))),
        "documents": ({"mask": (rows[:, None] == columns)[None, None]}, (documents, same, (rows, columns))),
        "relative": (
            {"bias": table[:, distance][None].to(case.dtype)},
            (relative, same, (table.to(case.dtype).float(), *sizes)),
        ),
    }


def needs_kernels() -> None:
    if foveate.backends()["triton"] is not None:
        pytest.skip(f"triton: {foveate.backends()['triton']}")


CASES = [
    AttentionCase(b=2, sq=37, skv=70, hq=4, hkv=2, d=32, causal=True),
    AttentionCase(b=1, sq=3, skv=50, hq=8, hkv=2, d=40, sinks=True, kv_lens=False),  # the heads are rows of one program
    AttentionCase(b=2, sq=40, skv=33, hq=2, hkv=2, d=64, dtype=torch.bfloat16, window=(20, 9)),
]


@pytest.mark.parametrize("name", ["softcap", "alibi", "documents", "relative"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_equals_the_option(case, name, seed, device):
    needs_kernels()
    inputs, all_twins = twins(case, seed, device)
    option, (forward, backward, aux) = all_twins[name]
    grads = compare.upstream(inputs, seed)
    mod = {"score_mod": forward, "score_mod_bwd": backward, "score_mod_aux": aux}
    options = {
        "causal": case.causal,
        "window": case.window,
        "sinks": inputs.sinks,
        "return_lse": True,
        "backend": "triton",
    }

    def run(dtype, **more):
        these = dataclasses.replace(inputs)
        leaves = [x.to(dtype).requires_grad_() for x in (these.q, these.k, these.v)]
        out, lse = foveate.attention(*leaves, **options | more)
        upstream = [g.to(x.dtype) for g, x in zip(grads, (out, lse))]
        return [out.detach(), lse.detach(), *torch.autograd.grad([out, lse], leaves, upstream)]

    ours, built_in = run(case.dtype, **mod), run(case.dtype, **option)
    exact = run(
        torch.float64,
        backend="reference",
        **{k: v.double() if k in ("alibi_slopes", "bias") else v for k, v in option.items()},
    )
    floors = compare.floors(inputs, grads)  # an option more in the scores adds little
    for which, a, b, c in zip(("out", "lse", "dq", "dk", "dv"), ours, built_in, exact):
        factor = compare.GRADIENT_FACTOR if which[0] == "d" else compare.FORWARD_FACTOR
        compare.assert_as_good_as_torch(a, c, b, factor, name=f"{name}: {which}", floor=floors[which])


def test_varlen_positions_count_within_the_sequence(seed, device):
    needs_kernels()
    q, k, v = (torch.randn(30, 2, 16, device=device, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 13, 13, 30], device=device)
    documents_of = torch.arange(17, device=device) // 5
    mod = {"score_mod": documents, "score_mod_bwd": same, "score_mod_aux": (documents_of, documents_of)}
    packed = foveate.attention_varlen(q, k, v, cu, cu, 17, 17, **mod, backend="triton")
    parts = [
        foveate.attention(*(x[None, a:b] for x in (q, k, v)), **mod, backend="triton")[0]
        for a, b in ((0, 13), (13, 30))
    ]
    torch.testing.assert_close(packed, torch.cat(parts))
    dout = torch.randn_like(packed)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (packed, torch.cat(parts)))):
        torch.testing.assert_close(a, b)


def test_with_the_other_options(seed, device):
    """bias, table and sinks get their gradients through a score_mod; dropout, lengths and masks hold."""
    needs_kernels()
    case = AttentionCase(
        b=2, sq=20, skv=40, hq=4, hkv=2, d=16, bias="1h1k", mask="b1qk", sinks=True, kv_lens=True, dropout=0.2,
        relative="bidirectional",
    )  # fmt: skip
    inputs = make_inputs(case, seed, device)
    grads = compare.upstream(inputs, seed)

    def run(**more):
        these = inputs.requires_grad()
        out, lse = these.run("triton", **more)
        return [out, lse, *torch.autograd.grad([out, lse], list(these.leaves.values()), grads)]

    for a, b in zip(run(softcap=None, score_mod=unchanged, score_mod_bwd=same), run(softcap=None)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@triton.jit
def unchanged(score, b, h, i, j, aux):
    return score


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_derivative_of_infinity_where_it_masks(seed, device):
    needs_kernels()
    q, k, v = (torch.randn(1, 20, 1, 16, device=device, requires_grad=True) for _ in range(3))
    ours = foveate.attention(q, k, v, score_mod=log_mask, score_mod_bwd=log_mask_bwd, backend="triton")
    peer = foveate.attention(q, k, v, causal=True, backend="triton")
    torch.testing.assert_close(ours, peer)
    dout = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), dout) for x in (ours, peer))):
        torch.testing.assert_close(a, b)


def test_indices_stay_inside_the_tensors(seed, device):
    """A function may use them as addresses, also in tiles that reach beyond the last query and key."""
    needs_kernels()
    q, k, v = (torch.randn(1, s, 1, 16, device=device, requires_grad=True) for s in (5, 19, 19))
    rows, columns = (torch.full((n + 200,), -(10**6), device=device) for n in (5, 19))
    rows[100:105], columns[100:119] = 0, 0
    mod = {"score_mod": documents, "score_mod_bwd": same, "score_mod_aux": (rows[100:105], columns[100:119])}
    out = foveate.attention(q, k, v, **mod, backend="triton")
    torch.testing.assert_close(out, foveate.attention(q, k, v, backend="triton"))
    torch.autograd.grad(out.sum(), (q, k, v))


def test_explain_names_the_backend_that_has_it():
    q = torch.zeros(1, 4, 2, 16)
    answers = foveate.explain(q, q, q, score_mod=unchanged)
    assert "only the triton backend" in answers.forward["native"]
    assert answers.forward["reference"] == answers.forward["native"]
    assert answers.backward["triton"] == "score_mod comes without its derivative; give score_mod_bwd"
    assert "with score_mod" in str(answers)
    given = foveate.explain(q, q, q, score_mod=unchanged, score_mod_bwd=same)
    assert given.backward["triton"] == given.forward["triton"]


Q = torch.zeros(1, 4, 2, 16)
GRAD = Q.clone().requires_grad_()


@pytest.mark.parametrize(
    ("q", "options", "error", "message"),
    [
        (Q, {"score_mod": unchanged, "backend": "native"}, foveate.UnsupportedError, "only the triton backend can run"),
        (
            Q,
            {"score_mod": unchanged, "backend": "reference"},
            foveate.UnsupportedError,
            "only the triton backend can run",
        ),
        (Q, {"score_mod_bwd": same}, ValueError, "belong to score_mod, which is None"),
        (
            Q,
            {"score_mod": lambda *_: 0},
            TypeError,
            "score_mod must be a function with @triton.jit above it, got function",
        ),
        (
            Q,
            {"score_mod": unchanged, "score_mod_aux": [1.0]},
            TypeError,
            r"score_mod_aux[0] must be a torch.Tensor, got float",
        ),
        (Q, {"score_mod": unchanged, "score_mod_aux": [GRAD]}, ValueError, r"score_mod_aux[0] has no gradient"),
        (GRAD, {"score_mod": unchanged}, ValueError, "score_mod came without its derivative; give score_mod_bwd"),
    ],
)
def test_bad_input(q, options, error, message, device):
    if error is not foveate.UnsupportedError and options.keys() != {"score_mod_bwd"}:
        needs_kernels()
        q = q.to(device)
    with pytest.raises(error, match=re.escape(message)):
        foveate.attention(q, q.detach(), q.detach(), **options)
