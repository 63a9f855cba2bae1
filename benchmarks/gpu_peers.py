"""One other library on the cases of `gpu.py`, in a process of its own: python benchmarks/gpu_peers.py fa3 FILE.csv."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu import Bench, Call, Report, Work, arguments, here, measure

PACKAGES = {"fa3": "fa3-fwd", "flashinfer": "flashinfer-python", "liger": "liger-kernel", "xformers": "xformers"}
MODULES = {"fa3": "fa3_fwd_interface", "flashinfer": "flashinfer", "liger": "liger_kernel", "xformers": "xformers.ops"}


def torch_calls(work: Work) -> dict[str, Call]:
    """What the peer's results are checked against."""
    from gpu import own_calls

    return dict([next(iter(own_calls(work).items()))])


def fa3(work: Work) -> dict[str, Call]:
    import fa3_fwd_interface as peer

    if work.op != "forward":
        return {}
    q, k, v, causal = work.inputs

    def call() -> Any:
        with torch.no_grad():
            out = peer.flash_attn_func(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return {"fa3": call}


def flashinfer(work: Work) -> dict[str, Call]:
    import flashinfer as peer

    if work.op not in ("forward", "decode paged"):
        return {}
    q, k, v = work.inputs[:3]
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    if work.op == "forward":
        B, S, H, D = q.shape
        ragged = peer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        starts = torch.arange(0, B * S + 1, S, dtype=torch.int32, device=q.device)
        ragged.plan(starts, starts, H, H, D, causal=work.inputs[3], q_data_type=q.dtype, kv_data_type=k.dtype)
        return {"flashinfer": lambda: ragged.run(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).view(q.shape)}
    table = work.inputs[4]
    B, pages = table.shape
    wrapper = peer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    last = torch.full((B,), 16, dtype=torch.int32, device=q.device)
    indptr = torch.arange(0, B * pages + 1, pages, dtype=torch.int32, device=q.device)
    wrapper.plan(indptr, table.flatten(), last, 32, 8, 128, 16, q_data_type=q.dtype, kv_data_type=k.dtype)
    return {"flashinfer": lambda: wrapper.run(q[:, 0], (k, v))[:, None]}


def liger(work: Work) -> dict[str, Call]:
    from liger_kernel.transformers import functional as peer

    if work.op == "linear_cross_entropy":
        hidden, weight, labels = work.inputs
        return {
            "liger": lambda: torch.autograd.grad(
                peer.liger_fused_linear_cross_entropy(hidden, weight, labels), (hidden, weight)
            )[0]
        }
    if work.op not in ("softmax", "cross_entropy", "rms_norm"):
        return {}
    x, target = work.inputs
    ones = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    # Liger's cross-entropy writes the gradient over its input.
    return {
        "softmax": {"liger": lambda: peer.liger_softmax(x)},
        "cross_entropy": {"liger": lambda: peer.liger_cross_entropy(x.clone(), target)},
        "rms_norm": {"liger": lambda: peer.liger_rms_norm(x, ones, 1e-6)},
    }[work.op]


def xformers(work: Work) -> dict[str, Call]:
    from xformers import ops as peer

    if work.op not in ("forward", "backward"):
        return {}
    q, k, v, causal = work.inputs
    if work.op == "backward":
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    bias = peer.LowerTriangularMask() if causal else None
    return {"xformers": lambda: peer.memory_efficient_attention(q, k, v, attn_bias=bias)}


CALLS: dict[str, Callable[[Work], dict[str, Call]]] = {
    "fa3": fa3,
    "flashinfer": flashinfer,
    "liger": liger,
    "xformers": xformers,
}


def calls(peer: str, work: Work) -> dict[str, Call]:
    """torch's call first, then the peer's; none of both where the peer has no such op, or cannot be set up for it."""
    try:
        found = CALLS[peer](work)
    except Exception as error:  # whatever a foreign library says
        print(f"{work.op}, {work.case}, {peer}: {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)
        return {}
    return torch_calls(work) | found if found else {}


def main() -> None:
    args = arguments("Times one other library.", "peer").parse_args()
    bench = Bench(args.dry_run, time.monotonic() + args.seconds)
    try:
        importlib.import_module(MODULES[args.peer])
    except Exception as error:  # a library for another torch or CUDA fails in many ways
        print(f"{args.peer}: cannot be imported: {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)
        return
    measure(bench, lambda work: calls(args.peer, work), Report(args.file, *here(bench, PACKAGES[args.peer]), args.peer))


if __name__ == "__main__":
    main()
