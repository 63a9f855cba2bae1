"""Times of the Triton kernels and of torch's on one GPU: python bench/gpu_triton.py FILE.csv. Each result is checked before it is timed."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveate


def milliseconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median and the middle 60 % of the runs; triton's do_bench clears L2 before each."""
    return tuple(triton.testing.do_bench(call, warmup=20, rep=100, quantiles=[0.5, 0.2, 0.8]))


def attention_rows() -> list[dict[str, object]]:
    rows = []
    for D, S, causal in [(D, S, c) for D in (64, 128, 256) for S in (1024, 8192) for c in (False, True)]:
        B, H = max(1, 16384 // S), 2048 // D
        q, k, v = (torch.randn(B, S, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        dout = torch.randn_like(q)

        def peer(backend: SDPBackend, q=q, k=k, v=v, causal=causal) -> Tensor:
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal)
            return out.transpose(1, 2)

        calls: dict[str, Callable[[], Tensor]] = {
            "foveate triton": lambda q=q, k=k, v=v, causal=causal: foveate.attention(
                q, k, v, causal=causal, backend="triton"
            ),
            "torch flash": lambda peer=peer: peer(SDPBackend.FLASH_ATTENTION),
            "torch cudnn": lambda peer=peer: peer(SDPBackend.CUDNN_ATTENTION),
        }
        expected = calls["torch flash"]()
        flops = 4 * B * H * S * S * D * (0.5 if causal else 1)
        for name, call in calls.items():
            try:
                out = call()
                torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
                forward = milliseconds(call)
                backward = milliseconds(
                    lambda out=out, q=q, k=k, v=v, g=dout: torch.autograd.grad(out, (q, k, v), g, retain_graph=True)
                )
            except RuntimeError as error:
                print(f"{name} D {D} S {S} causal {causal}: {str(error).splitlines()[0]}")
                continue
            for what, times, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
                rows.append({"op": f"attention {what}", "case": f"D {D} S {S} causal {causal}", "who": name, "ms": times[0],
                             "low": times[1], "high": times[2], "rate": factor * flops / times[0] * 1e-9, "unit": "TFLOP/s"})  # fmt: skip
    return rows


def decode_rows() -> list[dict[str, object]]:
    rows = []
    for B, S in ((1, 1024), (16, 8192), (64, 4096)):
        k, v = (torch.randn(B, S, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        q, lens = torch.randn(B, 1, 32, 128, device="cuda", dtype=torch.bfloat16), torch.full((B,), S, device="cuda")
        times = milliseconds(
            lambda q=q, k=k, v=v, n=lens: foveate.attention_with_kv_cache(q, k, v, kv_lens=n, backend="triton")
        )
        rate = 2 * k.numel() * 2 / times[0] * 1e-6
        rows.append({"op": "decode", "case": f"B {B} keys {S} heads 32/8 D 128", "who": "foveate triton", "ms": times[0],
                     "low": times[1], "high": times[2], "rate": rate, "unit": "GB/s"})  # fmt: skip
    return rows


def row_rows() -> list[dict[str, object]]:
    x = torch.randn(8192, 16384, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(0, 16384, (8192,), device="cuda")
    calls = {
        ("copy", "torch", 2): lambda: x.clone(),
        ("softmax", "foveate triton", 2): lambda: foveate.softmax(x, backend="triton"),
        ("softmax", "torch", 2): lambda: torch.softmax(x, -1),
        ("cross_entropy", "foveate triton", 1): lambda: foveate.cross_entropy(x, target, backend="triton"),
        ("cross_entropy", "torch", 1): lambda: F.cross_entropy(x, target),
    }
    rows = []
    for (op, who, passes), call in calls.items():
        times = milliseconds(call)
        rows.append({"op": op, "case": "8192 x 16384 bf16", "who": who, "ms": times[0], "low": times[1], "high": times[2],
                     "rate": passes * x.numel() * 2 / times[0] * 1e-6, "unit": "GB/s"})  # fmt: skip
    return rows


def main() -> None:
    torch.manual_seed(0)
    rows = attention_rows() + decode_rows() + row_rows()
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    with open(sys.argv[1], "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "device"])
        writer.writeheader()
        writer.writerows(row | {"device": device} for row in rows)
    for row in rows:
        print(
            f"{row['op']:<20} {row['case']:<28} {row['who']:<16} {row['ms']:9.3f} ms {row['rate']:9.1f} {row['unit']}"
        )


if __name__ == "__main__":
    main()
