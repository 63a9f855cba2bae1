"""The lists of operands: Python's and C++'s are one, and a tuple that is not as the list says raises before a kernel runs."""

from __future__ import annotations

import pytest
import torch

from foveate.backend import native
from foveate.ops.attention.cache_operands import WRITTEN, CacheOperands, CacheWorkspace
from foveate.ops.attention.operands import AXES, DIFFERENTIABLE, Gradients, Operands
from foveate.ops.attention.plan import DecodePlan

TUPLES = (Operands, Gradients, CacheOperands, CacheWorkspace, DecodePlan)
compiled = pytest.mark.skipif(native.missing_reason is not None, reason="no compiled module")


@compiled
@pytest.mark.parametrize("operands", TUPLES, ids=lambda operands: operands.__name__)
def test_the_compiled_module_has_the_same_fields(operands):
    assert native._C.operand_names()[operands.__name__] == operands._fields


@compiled
def test_the_compiled_module_has_no_other_lists():
    assert set(native._C.operand_names()) == {operands.__name__ for operands in TUPLES}


def test_every_tensor_has_axes_and_comes_first():
    annotations = {name: getattr(hint, "__forward_arg__", hint) for name, hint in Operands.__annotations__.items()}
    tensors = [name for name, hint in annotations.items() if str(hint).startswith("Tensor")]
    assert list(AXES) == tensors == list(Operands._fields[: len(tensors)])


def test_gradients_are_of_tensors():
    assert [Operands._fields[i] for i in DIFFERENTIABLE] == list(Gradients._fields)
    assert set(Gradients._fields) <= set(AXES)


def test_what_the_schema_marks_as_written():
    schema = torch.ops.foveate.attention_with_kv_cache.default._schema
    assert tuple(a.name for a in schema.arguments) == CacheOperands._fields
    assert tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write) == WRITTEN


def call(operands):
    out = torch.zeros(1, 2, 1, 4)
    native._C.attention_forward(operands, None, out, None, DecodePlan(1, 0, 1, 1, True), 1)
    return out


def plain():
    q, k, v = torch.randn(3, 1, 2, 1, 4).unbind()
    return Operands(q, k, v, max_q=2, max_k=2)


@compiled
@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("causal", 1, "causal must be a bool, got int"),
        ("window_left", 2.0, "window_left must be an integer of 64 bits, got float"),
        ("max_k", 2**70, "max_k must be an integer of 64 bits, got int"),
        ("scale", "x", "scale must be a number, got str"),
        ("bias", [1.0], "expected a torch.Tensor, got list"),
    ],
)
def test_a_field_of_another_type(field, value, sentence):
    assert call(plain()).any()
    with pytest.raises(TypeError, match=sentence):
        call(plain()._replace(**{field: value}))


@compiled
@pytest.mark.parametrize(
    "operands", [None, [], (), plain()[:-1], (*plain(), "")], ids=["None", "list", "none", "less", "more"]
)
def test_not_the_tuple(operands):
    with pytest.raises(TypeError, match="the operands must be a tuple, got|the operands are .*, expected 24"):
        call(operands)
