"""The forward kernel with tensor descriptors, for sm_90: it is as good as the plain one. `test_triton_compile.py` compiles it."""

from __future__ import annotations

import pytest
import torch

import compare
import foveate
from cases import AttentionCase, VarlenCase, make_inputs

if foveate.backends()["triton"] is not None:
    pytest.skip(f"triton: {foveate.backends()['triton']}", allow_module_level=True)

from foveate.backend.triton import attention_launch as launches
from foveate.backend.triton import config

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]

HALF = torch.bfloat16
CASES = [
    AttentionCase(b=1, sq=70, skv=64, d=64, dtype=HALF),
    AttentionCase(b=2, sq=70, skv=130, hq=4, hkv=2, d=64, dtype=HALF, causal=True),
    AttentionCase(b=1, sq=100, skv=90, d=64, dv=128, dtype=HALF, window=(30, 9)),
    AttentionCase(b=1, sq=140, skv=90, d=128, dtype=torch.float16, causal=True),  # the first queries see no key
    AttentionCase(b=3, sq=70, skv=150, hq=2, hkv=2, d=64, dtype=HALF, kv_lens=True, sinks=True),
    AttentionCase(b=2, sq=70, skv=70, hq=2, hkv=2, d=64, dtype=HALF, layout="bhsd", scale=0.2),
    VarlenCase((70, 0, 33, 5), (40, 10, 0, 90), AttentionCase(hq=2, hkv=1, d=64, dtype=HALF, causal=True)),
]  # fmt: skip


@pytest.fixture(params=[config.DESCRIPTORS, config.SPECIALIZED], ids=["descriptors", "specialized"])
def launched(request, monkeypatch, device):
    """The variant is chosen, with small blocks on the CPU; the list grows with each launch of the kernel."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the kernel is for sm_90")
    block = (64, 32, 4) if device == "cpu" else (128, 64, 4 if request.param == config.SPECIALIZED else 8)
    monkeypatch.setattr(config, "forward", lambda *shape: config.Config(*block, 2, request.param))
    monkeypatch.setattr(config, "packs", lambda *shape: False)
    found, launch = [], launches._with_scratch
    monkeypatch.setattr(launches, "_with_scratch", lambda *args, **options: (found.append(1), launch(*args, **options)))
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_against_exact(case, launched, device, seed):
    check = "test_triton_hopper.test_against_exact"
    compare.assert_case_as_good_as_torch(case, seed, "triton", device, check, backward=False)
    assert launched


OTHERS = [
    AttentionCase(d=64),  # fp32
    AttentionCase(d=40, dtype=HALF),
    AttentionCase(d=64, dtype=HALF, softcap=5.0),
    AttentionCase(d=64, dtype=HALF, alibi="h"),
    AttentionCase(d=64, dtype=HALF, dropout=0.1),
    AttentionCase(d=64, dtype=HALF, scale=-0.1),
    AttentionCase(d=64, dtype=HALF, bias="11qk"),
    AttentionCase(d=64, dtype=HALF, mask="11qk"),
]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.id)
def test_what_it_cannot_goes_the_plain_way(case, launched, device, seed):
    make_inputs(case, seed, device).run("triton")
    assert not launched


def test_tensors_that_tma_cannot_address_go_the_plain_way(launched, device):
    q = torch.randn(1, 40, 2, 72, device=device, dtype=HALF)
    plain = [q[..., 4:68], q[..., :1, :64].expand(-1, -1, 2, -1)[:, :1].expand(-1, 40, -1, -1)]
    for x in plain:  # 8 bytes off, and rows that are all the same one
        out = foveate.attention(x, x, x, backend="triton")
        assert not launched and out.isfinite().all()
    foveate.attention(*(q[..., 8:],) * 3, backend="triton")
    assert launched
