"""The compiled module itself: what it links, whose OpenMP threads it uses, that every CPU target computes the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import foveate
from foveate import _C

MODULE = Path(_C.__file__)


def run_python(code: str, **environment: str) -> str:
    """Runs `code` in a fresh interpreter and returns what it printed; its own error is the failure message."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def needed_libraries() -> list[str]:
    dynamic = subprocess.run(["readelf", "-d", str(MODULE)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)


def test_links_neither_torch_nor_the_cuda_runtime() -> None:
    needed = needed_libraries()
    assert not [name for name in needed if re.match(r"lib(torch|c10|cudart|cuda|cublas|nvrtc)", name)]
    assert "libgomp.so.1" in needed  # by this very name torch's own copy answers


def test_one_openmp_runtime_in_the_process() -> None:
    code = """
import torch
from foveate import _C
torch.ones(1 << 20).exp()
paths = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line or "iomp" in line}
print(len(paths), *paths)
"""
    count, *paths = run_python(code).split()
    assert int(count) == 1, f"several OpenMP runtimes are loaded: {paths}"
    assert "torch" in paths[0], f"the kernels run on {paths[0]}, not on torch's runtime"


def test_follows_torch_set_num_threads() -> None:
    code = """
import os, torch, foveate
x, weight = torch.randn(4096, 256), torch.ones(256)
def threads_after(count):
    torch.set_num_threads(count)
    foveate.rms_norm(x, weight, 1e-6, backend="native")
    return len(os.listdir("/proc/self/task"))
print(threads_after(1), threads_after(3))
"""
    alone, three = map(int, run_python(code).split())
    assert three == alone + 2


def test_at_least_one_target_is_compiled_and_the_best_is_taken() -> None:
    runnable = [name for name, runs in _C.cpu_targets() if runs]
    forced = os.environ.get("FOVEATE_CPU_TARGET")
    assert _C.cpu_target() == (forced or runnable[-1])


CHECK_TARGET = """
import torch, foveate
from foveate import _C
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    q, k, v = (torch.randn(2, 37, heads, 40, dtype=dtype) for heads in (4, 2, 2))
    out = foveate.attention(q, k, v, causal=True, backend="native")
    exact = foveate.attention(q.double(), k.double(), v.double(), causal=True, backend="reference")
    error = (out.double() - exact).abs().max().item()
    assert error <= 4 * torch.finfo(dtype).eps * v.abs().max().item(), (dtype, error)
print(_C.cpu_target())
"""


@pytest.mark.parametrize(("target", "runs_here"), _C.cpu_targets())
def test_every_compiled_target_computes_attention(target: str, runs_here: bool) -> None:
    if not runs_here:
        pytest.skip(f"this CPU has no {target} instructions")
    assert run_python(CHECK_TARGET, FOVEATE_CPU_TARGET=target) == target


def test_unknown_target_names_the_compiled_ones() -> None:
    code = """
import torch
from foveate import _C
try:
    _C.cpu_target()
except ValueError as error:
    print(error)
"""
    said = run_python(code, FOVEATE_CPU_TARGET="mmx")
    compiled = ", ".join(name for name, _ in _C.cpu_targets())
    assert said == f"FOVEATE_CPU_TARGET=mmx is not one of the compiled targets: {compiled}"


def test_cuda_info_explains_itself() -> None:
    info = _C.cuda_info()
    wanted = os.environ.get("FOVEATE_CUDA", "AUTO")
    if wanted == "OFF":
        assert not info["compiled"]
        assert "FOVEATE_CUDA=OFF" in info["error"]
    if wanted == "ON":
        assert info["compiled"]
    assert info["device_count"] == (torch.cuda.device_count() if info["compiled"] and torch.version.cuda else 0)
    assert bool(info["error"]) == (info["device_count"] == 0)


def test_package_is_typed() -> None:
    assert (Path(foveate.__file__).parent / "py.typed").exists()
