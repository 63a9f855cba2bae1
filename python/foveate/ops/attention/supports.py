"""Which backends serve `attention` and its backward pass: each answers None or the sentence why not."""

from __future__ import annotations

from typing import cast

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.native import runs_cuda_kernels
from foveate.backend.registry import Query, register
from foveate.ops.attention.operands import DTYPES
from foveate.ops.attention.plan import CPU_HEAD_DIM, GPU_HEAD_DIM

_NO_SCORE_MOD = "score_mod is a Triton function, which only the triton backend can run"


_native_shared = native.supports()


def _too_wide(query: Query, most: int) -> str | None:
    D, Dv = cast(tuple[int, int], query.features[:2])
    return f"its kernels take head dims up to {most}, these are {D} and {Dv}" if max(D, Dv) > most else None


def _native_supports(query: Query) -> str | None:
    if "score_mod" in query.features:
        return _NO_SCORE_MOD
    reason = _native_shared(query)
    if reason is None and query.dtype not in DTYPES:
        return f"the kernels take {', '.join(map(str, DTYPES))}, the tensors are {query.dtype}"
    return reason or _too_wide(query, GPU_HEAD_DIM if runs_cuda_kernels(query.device) else CPU_HEAD_DIM)


def _triton_supports(query: Query) -> str | None:
    return triton_backend.serves(query) or _too_wide(query, GPU_HEAD_DIM)


def _triton_backward_supports(query: Query) -> str | None:
    if "no score_mod_bwd" in query.features:
        return "score_mod comes without its derivative; give score_mod_bwd"
    return _triton_supports(query)


for _name in ("attention", "attention_backward"):
    register(_name, "native", _native_supports)
    register(_name, "triton", _triton_supports)
    register(_name, "reference", lambda query: _NO_SCORE_MOD if "score_mod" in query.features else None)
register("attention_backward", "triton", _triton_backward_supports)
