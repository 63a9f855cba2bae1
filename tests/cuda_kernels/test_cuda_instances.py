"""Every instance of the CUDA kernels once, by dtype, head dim and what else is compiled in: other files choose their cases by meaning, and
leave out some. On the PTX machine, CI then compares the kernels launched with all that there are (tests/ptx/ptx_programs.py)."""

from __future__ import annotations

import pytest
import torch

import compare
import foveate
from cases import AttentionCase
from kv_cases import KvCase, check_case

pytestmark = pytest.mark.cuda

F32, BF16, F16, I8, F8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
OPTIONS = [{}, {"causal": True, "softcap": 3.0}, {"bias": "bhqk"}, {"relative": "backward"}]


def names(options: dict[str, object]) -> str:
    return "-".join(options) or "plain"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=names)
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_forward_and_backward(dtype, d, options, deterministic, seed):
    case = AttentionCase(b=1, sq=19, skv=21, hq=2, hkv=1, d=d, dtype=dtype, **options)
    check = "test_attention_backward.check_backward"
    compare.assert_case_as_good_as_torch(case, seed, "native", "cpu", check, backward=True, deterministic=deterministic)


@pytest.mark.parametrize("d", [32, 64, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_prefill_over_pages(dtype, d, seed):
    case = KvCase(
        b=1, sq=70, d=d, dv=min(d, 128) if d == 192 else None, dtype=dtype, page_size=16, longest=40, rotary=8
    )
    check_case(case, seed, "native")


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("storage", [None, I8, F8], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_append_and_decode(dtype, storage, d, seed):
    check_case(KvCase(b=1, d=d, dtype=dtype, storage=storage, longest=40, rotary=8), seed, "native")


@pytest.mark.parametrize("columns", [64, 77, 20000])  # a row in registers, and one too long for them
@pytest.mark.parametrize("weight_dtype", [F32, None], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rms_norm_with_a_weight_in_fp32(dtype, weight_dtype, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, columns, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(columns, generator=generator).to(weight_dtype or dtype).requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    out = foveate.rms_norm(x, weight, 1e-5, backend="native")
    wanted = foveate.rms_norm(*exact, 1e-5, backend="reference")
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream.to(dtype))
    wanted.backward(upstream.to(dtype).double())
    for ours, theirs in ((out, wanted), (x.grad, exact[0].grad), (weight.grad, exact[1].grad)):
        assert (ours.double() - theirs).abs().max() <= 4 * torch.finfo(dtype).eps * theirs.abs().max()
