"""Which backend runs, what says so, and what a call that none can serve raises."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import foveate
from foveate.backend import native, registry
from foveate.ops.attention import definition
from foveate.ops.attention.operands import Used


def qkv(dtype=torch.float32):
    return [torch.randn(2, n, 4, 8).to(dtype) for n in (5, 7, 7)]


@pytest.fixture
def op():
    """A made-up op with two backends, of which native takes fp32 only."""
    name = "made_up"
    registry.register(name, "native", lambda query: None if query.dtype == torch.float32 else "it takes fp32")
    registry.register(name, "reference", lambda query: None if query.device == "cpu" else "it runs on cpu")
    yield name
    for backend in ("native", "reference"):
        del registry._supports[name, backend]
    registry.forget_choices()


def test_the_first_that_can_is_chosen(op):
    assert registry.choose(op, registry.Query("cpu", torch.float32), None) == "native"
    assert registry.choose(op, registry.Query("cpu", torch.int8), None) == "reference"


def test_a_named_backend_is_never_replaced(op):
    query = registry.Query("cpu", torch.int8)
    with pytest.raises(
        foveate.UnsupportedError, match=r"'native' cannot serve made_up: it takes fp32; backends that can: reference"
    ):
        registry.choose(op, query, "native")
    with pytest.raises(foveate.UnsupportedError, match="triton has no made_up"):
        registry.choose(op, query, "triton")


def test_no_backend_says_why_of_each(op):
    with pytest.raises(foveate.UnsupportedError, match=r"native: it takes fp32; triton: .*; reference: it runs on cpu"):
        registry.choose(op, registry.Query("cuda", torch.int8), None)


def test_unknown_name():
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"backend='cudnn' is unknown; choose one of native, triton, reference"):
        foveate.attention(q, k, v, backend="cudnn")
    with pytest.raises(ValueError, match="backend='cudnn' is unknown"):
        foveate.explain(q, k, v, backend="cudnn")


def test_unsupported_error_of_attention():
    q, k, v = qkv()
    with pytest.raises(foveate.UnsupportedError, match=r"backend='triton' cannot serve attention: .*reference"):
        foveate.attention(q, k, v, backend="triton")


def test_backends_and_info():
    answers = foveate.backends()
    assert list(answers) == ["native", "triton", "reference"]
    assert answers["reference"] is None
    assert (answers["native"] is None) == (native.missing_reason is None)
    info = foveate.info()
    assert info["foveate"] == foveate.__version__ and info["threads"] == torch.get_num_threads()
    assert "torch" in str(info) and str(info).count("\n") == len(info) - 1


@pytest.mark.skipif(native.missing_reason is not None, reason="no compiled module")
def test_info_of_the_compiled_module():
    assert foveate.info()["cpu target"] in foveate.info()["cpu targets"]


def test_without_the_compiled_module(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "missing_reason", "the compiled module is missing")
    assert foveate.backends()["native"] == "the compiled module is missing"
    assert foveate.info()["backend native"] == "the compiled module is missing"
    assert foveate.explain(*qkv()).forward["native"] == "the compiled module is missing"
    assert foveate.explain(*qkv()).chosen == "reference"


def test_explain_names_what_runs():
    q, k, v = qkv()
    said = foveate.explain(q, k, v, causal=True, window=(3, 0), softcap=5.0, sinks=torch.zeros(4))
    assert said.query.features == (8, 8, "sinks", "causal", "window", "softcap")
    assert said.chosen == ("native" if native.missing_reason is None else "reference")
    lines = str(said).splitlines()
    assert len(lines) == 5 and "with sinks, causal, window, softcap" in lines[0]
    assert any(line.startswith(said.chosen) and "chosen" in line for line in lines)
    assert foveate.explain(q, k, v, backend="reference").chosen == "reference"
    assert foveate.explain(q, k, v, backend="triton").chosen is None


def test_explain_of_packed_and_of_other_devices():
    q, k, v = (x.flatten(0, 1) for x in qkv())
    cu = torch.tensor([0, 5, 10])
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    assert foveate.explain(q, k, v, **packed).query.features == (8, 8, "varlen")
    meta = [x.to("meta") for x in qkv()]
    said = foveate.explain(*meta)
    assert said.chosen == "reference" and "meta" in said.forward["native"]


def test_explain_refuses_what_the_call_refuses():
    q, k, v = qkv()
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        foveate.explain(q, k, v, casual=True)
    with pytest.raises(ValueError, match="multiple of the number of KV heads"):
        foveate.explain(q[:, :, :3], k, v)


def test_every_option_is_seen_by_the_choice():
    """Each alone; the last of them as the first: a list cut short once hid one from the backends without a word."""
    q, k, v = qkv()
    B, Sq, Hq, _ = q.shape
    Skv = k.shape[1]
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    ends = [torch.arange(B + 1, dtype=torch.int32) * n for n in (Sq, Skv)]
    packed = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1], "max_seqlen_q": Sq, "max_seqlen_k": Skv}
    calls = {
        "bias": {"bias": torch.zeros(Sq, Skv)},
        "mask": {"mask": torch.ones(Sq, Skv, dtype=torch.bool)},
        "alibi_slopes": {"alibi_slopes": torch.ones(Hq)},
        "relative_bias": {"relative_bias": foveate.RelativeBias(torch.zeros(8, Hq))},
        "sinks": {"sinks": torch.zeros(Hq)},
        "kv_lens": {"kv_lens": torch.full((B,), Skv)},
        "varlen": packed,
        "causal": {"causal": True},
        "window": {"window": (3, None)},
        "softcap": {"softcap": 2.0},
        "dropout_p": {"dropout_p": 0.1},
        "score_mod": {"score_mod": object()},
    }
    assert tuple(calls) == Used._fields
    for name, options in calls.items():
        tensors = flat if name == "varlen" else (q, k, v)
        assert foveate.explain(*tensors, **options).query.features[2:] == (name,)


def test_asking_about_dropout_draws_no_numbers():
    tensors, before = qkv(), torch.random.get_rng_state()
    foveate.explain(*tensors, dropout_p=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_named_backend_runs(monkeypatch):
    """The reference is called for backend="reference" and not for "native"."""
    called = []
    real = definition.forward
    monkeypatch.setattr(definition, "forward", lambda c: called.append(1) or real(c))
    q, k, v = qkv()
    foveate.attention(q, k, v, backend="reference")
    assert called == [1]
    if native.missing_reason is None:
        foveate.attention(q, k, v, backend="native")
        assert called == [1]


def test_importing_foveate_imports_little() -> None:
    """Not torch's compiler (a second), not triton, not the model layer."""
    heavy = ("torch._dynamo", "triton", "transformers", "tokenizers", "foveate.models", "foveate.generation")
    code = f"import sys, foveate; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
