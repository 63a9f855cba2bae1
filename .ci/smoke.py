"""Runs against an installed wheel with nothing but torch beside it: the module loads, computes what torch computes, and is typed."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

import foveate
from foveate import _C

package = Path(foveate.__file__).parent
assert "site-packages" in package.parts, f"foveate comes from {package}, not from the wheel"
assert (package / "py.typed").exists() and (package / "_C.pyi").exists()
assert (package / "serve" / "static" / "index.html").exists(), (
    "the chat page is not in the wheel: `make page` comes first"
)

q, k, v = (torch.randn(2, 65, heads, 64) for heads in (4, 2, 2))
out = foveate.attention(q, k, v, causal=True, backend="native")
expected = F.scaled_dot_product_attention(
    *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
).transpose(1, 2)
error = (out - expected).abs().max().item()
assert error < 1e-5, f"attention differs from torch by {error}"
print(
    f"foveate {foveate.__version__}, CPU target {_C.cpu_target()}, {_C.cuda_info()}: attention within {error:.1e} of torch"
)
