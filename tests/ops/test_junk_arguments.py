"""Every parameter of every public op with values that nothing takes: an error of foveate's own, which names the parameter."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import foveate

randn = torch.randn
Q, K, V = randn(2, 3, 4, 8), randn(2, 5, 2, 8), randn(2, 5, 2, 8)
CU = torch.tensor([0, 2, 5])
CALLS: dict[str, dict[str, Any]] = {
    "attention": {"q": Q, "k": K, "v": V},
    "attention_varlen": {"q": Q[0].repeat(2, 1, 1)[:5], "k": K[0], "v": V[0], "cu_seqlens_q": CU, "cu_seqlens_k": CU,
                         "max_seqlen_q": 3, "max_seqlen_k": 3},
    "attention_with_kv_cache": {"q": Q[:, :1], "k_cache": K.clone(), "v_cache": V.clone(), "k": K[:, :1], "v": V[:, :1],
                                "kv_lens": torch.tensor([3, 4])},
    "attention_weights": {"q": Q, "k": K, "rows": [0]},
    "merge_attention": {"out_a": randn(1, 2, 2, 4), "lse_a": randn(1, 2, 2), "out_b": randn(1, 2, 2, 4), "lse_b": randn(1, 2, 2)},
    "explain": {"q": Q, "k": K, "v": V},
    "sdpa": {"query": Q, "key": Q, "value": Q},
    "softmax": {"x": randn(3, 4)},
    "log_softmax": {"x": randn(3, 4)},
    "cross_entropy": {"logits": randn(3, 4), "target": torch.arange(3)},
    "linear_cross_entropy": {"hidden": randn(3, 8), "weight": randn(4, 8), "target": torch.arange(3)},
    "rms_norm": {"x": randn(3, 8), "weight": randn(8), "eps": 1e-5},
    "apply_rotary": {"q": Q, "k": Q[:, :, :2], "cos": randn(3, 4), "sin": randn(3, 4)},
    "swiglu": {"gate": randn(3, 4), "up": randn(3, 4)},
    "geglu": {"gate": randn(3, 4), "up": randn(3, 4)},
    "RelativeBias": {"table": randn(8, 4)},
}  # fmt: skip
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    JUNK: dict[str, Any] = {
        "an object": object(), "a function": lambda: 1, "a text": "x", "a dictionary": {"a": 1}, "a dtype": torch.int8,
        "an integer beyond 64 bits": 10**30, "many dimensions": randn(2, 2, 2, 2, 2), "bool": torch.ones(3, 4, dtype=torch.bool),
        "complex": torch.zeros(3, 4, dtype=torch.complex64), "sparse": torch.eye(4).to_sparse(),
        "nested": torch.nested.nested_tensor([randn(2, 4), randn(3, 4)], layout=torch.jagged),
    }  # fmt: skip
# What a call can take, or a sentence about another argument says.
TAKEN = {
    ("softmax", "x", "many dimensions"), ("log_softmax", "x", "many dimensions"), ("softmax", "mask", "bool"),
    ("sdpa", "key", "nested"), ("sdpa", "value", "nested"), ("sdpa", "query", "nested"),
}  # fmt: skip
NUMBERS = ("scale", "softcap", "z_loss", "eps", "offset")  # of any size


@pytest.mark.parametrize("op", CALLS)
def test_the_error_names_the_argument(op):
    function: Callable[..., Any] = getattr(foveate, op)
    tried = 0
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        for kind, value in JUNK.items():
            if (op, parameter.name, kind) in TAKEN or (parameter.name in NUMBERS and isinstance(value, int)):
                continue
            tried += 1
            with pytest.raises((TypeError, ValueError, foveate.UnsupportedError)) as raised:
                function(**CALLS[op] | {parameter.name: value})
            said = f"{op}({parameter.name}={kind}): {raised.value}"
            assert "foveate" in str(raised.traceback[-1].path), said
            assert parameter.name.split("_")[0] in str(raised.value), said
    assert tried >= 10


def test_sdpa_speaks_of_its_own_arguments():
    q, k = randn(2, 4, 3, 8), randn(2, 4, 5, 6)
    with pytest.raises(ValueError, match="query has head dim 8 and key has 6"):
        foveate.sdpa(q, k, k)
    with pytest.raises(ValueError, match=r"attn_mask of shape \[1, 1, 3, 4\]"):
        foveate.sdpa(q, q, q, attn_mask=randn(3, 4))


@pytest.mark.parametrize("rows", [True, [True, False, True]])
def test_flags_are_no_rows(rows):
    with pytest.raises(TypeError, match="rows has True; it must have integers"):
        foveate.attention_weights(Q, K, rows=rows)


def test_linear_cross_entropy_of_meta_tensors():
    h, w = (torch.empty(shape, device="meta", requires_grad=True) for shape in ((3, 8), (4, 8)))
    target = torch.empty(3, dtype=torch.int64, device="meta")
    foveate.linear_cross_entropy(h, w, target).backward()
    assert h.grad.shape == h.shape and h.grad.is_meta
    assert foveate.linear_cross_entropy(h, w, target, reduction="none").shape == (3,)
