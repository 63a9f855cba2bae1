"""Peak memory of one forward and backward, in a process of its own: python -m foveate.bench.memory CASE-AS-JSON IMPLEMENTATION.

The kernel keeps the highest resident size of a process (VmHWM). What was higher before the measured call would hide its use, so
memory is held until the present size is that peak; the growth of the peak is then the call's own: output, lse, gradients, workspace.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import foveate
from foveate.bench.cases import DTYPES, MemoryCase


def measure(case: MemoryCase, implementation: str, threads: int) -> int:
    """Bytes by which forward + backward raise the peak of a fresh process. implementation: "foveate", "sdpa", or "reference", which
    stores the scores and shows what that costs."""
    command = [sys.executable, "-m", __name__, json.dumps(dataclasses.asdict(case)), implementation, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the memory bench of {case.name} ({implementation}) failed:\n{done.stderr.strip()}")
    return int(done.stdout)


def growth_exponent(lengths: Sequence[int], peaks: Sequence[int]) -> float:
    """The a of peak = c * S**a, by least squares on logarithms: 1 is linear, 2 what storing the scores costs."""
    if len(lengths) < 2:
        raise ValueError(f"{len(lengths)} length has no slope; measure two or more")
    x, y = [math.log(n) for n in lengths], [math.log(n) for n in peaks]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _forward_backward(implementation: str, S: int, case: MemoryCase) -> None:
    q, k, v, g = (torch.randn(case.B, S, case.H, case.D).to(DTYPES[case.dtype]) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if implementation == "sdpa":
        leaves = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in leaves]
        g = g.transpose(1, 2).contiguous()
    ballast = _hold_up_to_the_peak()
    before = _status_bytes("VmHWM")
    if implementation == "sdpa":
        out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True)
    else:
        backend = "reference" if implementation == "reference" else None
        out = foveate.attention(leaves[0], leaves[1], leaves[2], causal=True, backend=backend)  # type: ignore[assignment]
    grads = torch.autograd.grad(out, leaves, g)
    growth = _status_bytes("VmHWM") - before
    if S == case.S:
        print(growth)
    del ballast, grads


def _hold_up_to_the_peak() -> Tensor:
    return torch.ones(max(0, _status_bytes("VmHWM") - _status_bytes("VmRSS")) // 4)


def main() -> None:
    torch.set_num_threads(int(sys.argv[3]))
    case = MemoryCase(**json.loads(sys.argv[1]))
    _forward_backward(sys.argv[2], 64, case)  # starts the threads and loads what is loaded late
    _forward_backward(sys.argv[2], case.S, case)


if __name__ == "__main__":
    main()
