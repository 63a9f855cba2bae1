"""Whatever the compiled functions are given, they raise or answer. FOVEATE_FUZZ_CASES sets the number of cases (`make fuzz`: 20,000)."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from foveate.backend import native

if native.missing_reason is not None:
    pytest.skip("no compiled module", allow_module_level=True)

import native_fuzz

pytestmark = pytest.mark.sanitize

CASES = int(os.environ.get("FOVEATE_FUZZ_CASES", "500"))
IN_ONE_PROCESS = 1000
SECONDS = 300
SCRIPT = Path(native_fuzz.__file__)


def run(seed: int, first: int, count: int, marker: Path) -> collections.Counter[str]:
    """How often each function returned and raised."""
    env = dict(os.environ, FOVEATE_FUZZ_CASE=str(marker), OMP_WAIT_POLICY="passive")
    command = [sys.executable, "-X", "faulthandler", str(SCRIPT), str(seed), str(first), str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=env)
        end, said = f"died with {done.returncode}", done.stderr
    except subprocess.TimeoutExpired:
        done, end, said = None, f"did not end within {SECONDS} s", ""
    if done is None or done.returncode != 0:
        number = marker.read_text().strip() if marker.exists() else "?"
        pytest.fail(f"`python tests/{SCRIPT.name} {seed} {number} 1` {end}: {said[-2000:]}")
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    return collections.Counter({key: int(n) for key, n in lines})


@pytest.mark.fuzz
def test_compiled_functions_survive_anything(seed, tmp_path):
    """Each function answers some calls, so that the others are near misses."""
    total: collections.Counter[str] = collections.Counter()
    for first in range(0, CASES, IN_ONE_PROCESS):
        total += run(seed, first, min(IN_ONE_PROCESS, CASES - first), tmp_path / "case")
    assert total.total() == CASES
    for name in native_fuzz.CALLS:
        assert total[f"{name} returned"], f"{name} has returned from no call"
        assert total[f"{name} raised"], f"{name} has refused no call"


def test_every_compiled_function_is_among_them():
    """A new function of the module needs a line in native_fuzz.CALLS."""
    names = {name for name, x in vars(native._C).items() if isinstance(x, type | types.BuiltinFunctionType)}
    assert {n for n in names if not n.startswith("_")} - native_fuzz.NOT_CALLED == set(native_fuzz.CALLS)


@pytest.mark.parametrize("threads", [0, -1, -(2**31), 2**31, 2**62])
def test_number_of_threads(threads):
    """The smallest inputs that corrupted the heap, or left the result unwritten."""
    code = f"""
import torch
from foveate.backend.native import _C
x, y = torch.randn(300, 1000), torch.zeros(300, 1000)
for call in (lambda: _C.softmax_forward(x, None, None, y, 1.0, False, False, {threads}),
             lambda: _C.rms_norm_backward(x, x, None, torch.ones(300), None, y, None, {threads})):
    y.zero_()
    try:
        call()
        assert {threads} > 0 and y.any(dim=1).all()
    except ValueError as error:
        assert {threads} < 1 and "threads = {threads} must be at least 1" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr


EMPTY_HEADS = """
import torch, foveate
from foveate.ops.attention.operands import Operands
zeros = torch.zeros
cache = foveate.attention_with_kv_cache(zeros(1, 1, 2, 16), zeros(1, 8, 1, 16), zeros(1, 8, 1, 0), kv_lens=torch.tensor([3]))
assert cache.shape == (1, 1, 2, 0)
for D, Dv in ((16, 0), (0, 16), (0, 0)):
    out, lse = zeros(1, 1, 2, Dv), zeros(1, 2, 1)
    operands = Operands(zeros(1, 1, 2, D), zeros(1, 5, 1, D), torch.ones(1, 5, 1, Dv), max_q=1, max_k=5)
    for plan in ((1, 0, 1, 1, True), (1, 0, 1, 1, False)):
        foveate.backend.native._C.attention_forward(operands, None, out, lse, plan, 1)
    assert out.eq(1).all() and torch.allclose(lse, torch.tensor(5.0).log())
"""


def test_head_dim_zero_divides_nothing():
    done = subprocess.run([sys.executable, "-c", EMPTY_HEADS], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"
