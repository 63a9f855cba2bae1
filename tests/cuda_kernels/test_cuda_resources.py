"""tools/cuda_resources.py reads what cuobjdump and ptxas print, and finds kernels with a stack frame."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import cuda_resources
from cuda_resources import Kernel

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7foveate4cuda6kernelINS_4bf16ELb1EEEvNS0_6ParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN7foveate4cuda6kernelINS_4bf16ELb1EEEvNS0_6ParamsE
    80 bytes stack frame, 100 bytes spill stores, 52 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 80 bytes cumulative stack size, 520 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN7foveate4cuda6kernelINS_3f16ELb0EEEvNS0_6ParamsE' for 'sm_80'
ptxas info    : Function properties for _ZN7foveate4cuda6kernelINS_3f16ELb0EEEvNS0_6ParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 520 bytes cmem[0]
"""
MODULE = """
Fatbin ptx code:
================
arch = sm_80
code version = [9,0]

Fatbin elf code:
================
arch = sm_80
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7foveate4cuda6kernelINS_4bf16ELb1EEEvNS0_6ParamsE:
  REG:128 STACK:80 SHARED:0 LOCAL:0 CONSTANT[0]:1192 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN7foveate4cuda6kernelINS_3f16ELb0EEEvNS0_6ParamsE:
  REG:64 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1192 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Function _ZN7foveate4cuda6kernelINS_4bf16ELb1EEEvNS0_6ParamsE:
  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:1192 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_reads_the_compiler() -> None:
    assert cuda_resources.read_compiler(LOG, "sm_80") == [
        Kernel("sm_80", "kernel<bf16,true>", 128, 80, 152),
        Kernel("sm_80", "kernel<f16,false>", 64, 0, 0),
    ]
    assert cuda_resources.read_compiler(LOG, "sm_90a") == []


def test_reads_the_module() -> None:
    assert cuda_resources.read_module(MODULE) == [
        Kernel("sm_80", "kernel<bf16,true>", 128, 80),
        Kernel("sm_80", "kernel<f16,false>", 64, 0),
        Kernel("sm_90a", "kernel<bf16,true>", 168, 0),
    ]


def test_finds_what_is_not_listed(tmp_path: Path) -> None:
    kernels = cuda_resources.read_module(MODULE)
    assert cuda_resources.faults(kernels, {}) == [
        "sm_80 kernel<bf16,true>: 80 bytes of stack, with 128 registers; allowed are 0"
    ]
    (tmp_path / "list").write_text("# comment\nsm_80 kernel<bf16,true> 80 # the tail of a row\n")
    assert cuda_resources.faults(kernels, cuda_resources.read_list(tmp_path / "list")) == []
    (tmp_path / "list").write_text("sm_80 kernel<bf16,true> 79\n")
    assert len(cuda_resources.faults(kernels, cuda_resources.read_list(tmp_path / "list"))) == 1


def test_the_module_is_within_the_list(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from foveate import _C

    if _C.cuda_emulated or not _C.has_cuda_kernels():
        pytest.skip("the module is built without nvcc's kernels")
    monkeypatch.setattr(sys, "argv", ["cuda_resources.py"])
    status = cuda_resources.main()
    assert status == 0, capfd.readouterr().err


# A library does not end the process or print, and a launch that waits or allocates cannot be captured in a graph.
FORBIDDEN = re.compile(
    r"\b(printf|exit|abort|assert|cudaMalloc\w*|cudaFree\w*|cudaMemcpy\w*|cudaMemset\w*|\w*Synchronize)\s*\("
)


def test_host_code_of_the_kernels_neither_waits_nor_allocates() -> None:
    root = Path(__file__).parents[2] / "csrc"
    sources = [path for folder in ("cuda", "ops", "decoder") for path in (root / folder).rglob("*.*")]
    assert len(sources) > 40
    found = {path.name: calls for path in sources if (calls := FORBIDDEN.findall(path.read_text()))}
    assert found == {}
    assert (
        FORBIDDEN.search("cudaStreamSynchronize(stream)")
        and FORBIDDEN.search('printf ("x")')
        and FORBIDDEN.search("exit(1)")
    )
