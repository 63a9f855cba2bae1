"""What is passed by mistake, for every argument of every public op: an error that names the argument, before anything is computed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import foveate

ROWS, TARGET = torch.randn(4, 7), torch.tensor([1, 2, 3, 4])
Q, K = torch.randn(1, 4, 2, 8), torch.randn(1, 6, 2, 8)
PACKED, CU = torch.randn(6, 2, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
LENS, TABLE = torch.tensor([6]), torch.zeros(1, 1, dtype=torch.int32)
COS = torch.randn(4, 4)

BAD = {
    "number": ("0.1", [0.1], 1j, {}, np.ones(2)),
    "optional number": ("0.1", [0.1], 1j),
    "integer": ("1", 1.0, None, [1], np.float32(1)),
    "flag": ("no", None, 2, torch.tensor(True), [True]),
    "tensor": (np.ones((4, 7)), [[1.0]], "x", torch.eye(4).to_sparse()),
    "window": (4, ("a", 0), (1.0, 0), (torch.tensor(2), torch.tensor(0)), (1, 2, 3), "12"),
    "backend": (True, 1, "cuda", ["native"]),
    "generator": (7, "seed"),
}
NUMBERS = {"scale": "optional number", "softcap": "optional number", "window": "window", "backend": "backend"}
MASKS = {"alibi_slopes": "tensor", "sinks": "tensor"}
TRAINING = {"dropout_p": "number", "deterministic": "flag", "return_lse": "flag", "causal": "flag"}

# function, the arguments of a right call, and the kind of each of its arguments
OPS = {
    "attention": (
        foveate.attention,
        {"q": Q, "k": K, "v": K},
        {"q": "tensor", "k": "tensor", "v": "tensor", "bias": "tensor", "mask": "tensor", "kv_lens": "tensor"} | NUMBERS | MASKS | TRAINING,
    ),
    "attention_varlen": (
        foveate.attention_varlen,
        {"q": PACKED, "k": PACKED, "v": PACKED, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": 4, "max_seqlen_k": 4},
        {"q": "tensor", "cu_seqlens_q": "tensor", "cu_seqlens_k": "tensor", "max_seqlen_q": "integer", "max_seqlen_k": "integer"}
        | NUMBERS | MASKS | TRAINING,
    ),
    "attention_with_kv_cache": (
        foveate.attention_with_kv_cache,
        {"q": Q, "k_cache": K, "v_cache": K, "kv_lens": LENS},
        {"q": "tensor", "k_cache": "tensor", "v_cache": "tensor", "kv_lens": "tensor", "block_table": "tensor", "num_splits": "integer",
         "causal": "flag", "rotary_interleaved": "flag", "batch_invariant": "flag", "return_lse": "flag"} | NUMBERS | MASKS,
    ),
    "softmax": (
        foveate.softmax,
        {"x": ROWS},
        {"x": "tensor", "dim": "integer", "scale": "optional number", "mask": "tensor", "bias": "tensor", "causal": "flag",
         "backend": "backend"},
    ),
    "log_softmax": (foveate.log_softmax, {"x": ROWS}, {"x": "tensor", "dim": "integer", "backend": "backend"}),
    "rms_norm": (
        foveate.rms_norm, {"x": ROWS, "weight": None, "eps": 1e-6},
        {"x": "tensor", "weight": "tensor", "eps": "optional number", "backend": "backend"},
    ),
    "apply_rotary": (
        foveate.apply_rotary, {"q": Q, "k": Q, "cos": COS, "sin": COS},
        {"q": "tensor", "k": "tensor", "cos": "tensor", "sin": "tensor", "interleaved": "flag", "backend": "backend"},
    ),
    "cross_entropy": (
        foveate.cross_entropy, {"logits": ROWS, "target": TARGET},
        {"logits": "tensor", "target": "tensor", "ignore_index": "integer", "label_smoothing": "number", "z_loss": "number",
         "softcap": "optional number", "backend": "backend"},
    ),
    "linear_cross_entropy": (
        foveate.linear_cross_entropy, {"hidden": ROWS, "weight": torch.randn(9, 7), "target": TARGET},
        {"hidden": "tensor", "weight": "tensor", "target": "tensor", "bias": "tensor", "ignore_index": "integer",
         "label_smoothing": "number", "z_loss": "number", "softcap": "optional number", "backend": "backend"},
    ),
}  # fmt: skip
CASES = [
    pytest.param(op, argument, value, id=f"{op}-{argument}-{type(value).__name__}{i}")
    for op, (_, _, arguments) in OPS.items()
    for argument, kind in arguments.items()
    for i, value in enumerate(BAD[kind])
]


@pytest.mark.parametrize("op, argument, value", CASES)
def test_a_wrong_type_is_named(op, argument, value):
    function, right, _ = OPS[op]
    with pytest.raises((TypeError, ValueError)) as error:
        function(**{**right, argument: value})
    text = str(error.value)
    assert argument in text and len(text) > 25 and "foveate::" not in text


@pytest.mark.parametrize("op", OPS)
def test_the_right_calls_are_right(op):
    """Else the test above would see another error than it means to."""
    function, right, _ = OPS[op]
    function(**right)


def test_a_generator_is_named():
    for value in BAD["generator"]:
        with pytest.raises(TypeError, match="generator must be a torch.Generator"):
            foveate.attention(Q, K, K, dropout_p=0.1, generator=value)


def test_a_cache_call_refuses_what_it_would_give_no_gradient():
    learned = torch.randn(9, 4, requires_grad=True)
    with pytest.raises(ValueError, match="rotary_cos requires a gradient"):
        foveate.attention_with_kv_cache(Q, K, K, kv_lens=LENS, rotary_cos=learned, rotary_sin=learned.detach())
    scale, cache = torch.ones(2, requires_grad=True), K.to(torch.int8)
    with pytest.raises(ValueError, match="k_scale requires a gradient"):
        foveate.attention_with_kv_cache(Q, cache, cache, kv_lens=LENS, k_scale=scale, v_scale=1.0)


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)], ids=repr)
def test_numbers_of_other_libraries_are_taken(number):
    assert torch.equal(foveate.attention(Q, K, K, scale=number), foveate.attention(Q, K, K, scale=0.25))
    assert torch.equal(foveate.softmax(ROWS, scale=number), foveate.softmax(ROWS, scale=0.25))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 10**400], ids=["nan", "inf", "10**400"])
def test_numbers_that_are_not_finite(number):
    for function, name in ((foveate.softmax, "scale"), (foveate.cross_entropy, "z_loss")):
        with pytest.raises(ValueError, match=name):
            function(*((ROWS,) if name == "scale" else (ROWS, TARGET)), **{name: number})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rms_norm_without_eps_takes_torchs(dtype):
    x = (torch.randn(3, 16) * 1e-3).to(dtype)
    want = torch.nn.functional.rms_norm(x.double(), (16,), None, torch.finfo(dtype).eps)
    torch.testing.assert_close(foveate.rms_norm(x, None, None).double(), want, rtol=torch.finfo(dtype).eps * 4, atol=0)
