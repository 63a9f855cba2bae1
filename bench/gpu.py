"""Times of the CUDA and Triton kernels beside torch's and other libraries' on one GPU: python bench/gpu.py FILE.csv.

Each result is checked before it is timed. The other libraries (`gpu_peers.py`) run in processes of their own, from the folders named after
them in the folder that FOVEATE_PEERS names (`pip install --target $FOVEATE_PEERS/liger liger-kernel`). --dry-run: tiny shapes on the CPU,
to see that everything works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveate

PEERS = ("fa3", "flashinfer", "liger", "xformers")
FIELDS = ("op", "case", "who", "ms", "low", "high", "rate", "unit", "device", "versions")
Call = Callable[[], Any]


class Bench(NamedTuple):
    """What a process has been asked for."""

    dry: bool
    deadline: float  # by time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


class Work(NamedTuple):
    """One case of an op: its inputs, and what a rate is made of."""

    op: str
    case: str
    inputs: tuple[Any, ...]
    amount: float  # floating-point operations, or bytes
    unit: str  # "TFLOP/s" or "GB/s"


def milliseconds(bench: Bench, call: Call) -> tuple[float, float, float]:
    """Median and the middle 60 % of the runs; do_bench clears L2 before each."""
    if bench.dry:
        start = time.perf_counter()
        call()
        return (1e3 * (time.perf_counter() - start),) * 3
    import triton

    return tuple(triton.testing.do_bench(call, warmup=10, rep=60, quantiles=[0.5, 0.2, 0.8]))


def works(bench: Bench) -> Iterator[Work]:
    """The cases, the same in every process, the most telling first: inputs come from one seed."""
    torch.manual_seed(0)
    yield from attention_works(bench, [(128, 8192, True), (128, 8192, False)])
    yield from decode_works(bench)
    yield from row_works(bench)
    yield from linear_works(bench)
    yield from attention_works(bench, [(64, 8192, True), (64, 8192, False), (128, 1024, True), (256, 8192, True)])


def normal(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)


def attention_works(bench: Bench, shapes: list[tuple[int, int, bool]]) -> Iterator[Work]:
    for D, S, causal in shapes:
        case = f"D {D} S {S} {'causal' if causal else 'full'}"
        B, S, H = (1, 64, 2) if bench.dry else (16384 // S, S, 2048 // D)
        q, k, v = (normal(bench, B, S, H, D) for _ in range(3))
        flops = 4 * B * H * S * S * D * (0.5 if causal else 1)
        yield Work("forward", case, (q, k, v, causal), flops, "TFLOP/s")
        yield Work("backward", case, (q, k, v, causal), 2.5 * flops, "TFLOP/s")


def decode_works(bench: Bench) -> Iterator[Work]:
    for B, S in ((1, 1024), (16, 8192), (64, 4096)):
        case = f"B {B} keys {S} heads 32/8 D 128"
        B, S = (2, 64) if bench.dry else (B, S)
        k, v = (normal(bench, B * S // 16, 16, 8, 128) for _ in range(2))
        table = torch.randperm(B * S // 16, device=bench.device).view(B, -1).int()
        lens = torch.full((B,), S, dtype=torch.int32, device=bench.device)
        yield Work("decode paged", case, (normal(bench, B, 1, 32, 128), k, v, lens, table), 4.0 * k.numel(), "GB/s")


def row_works(bench: Bench) -> Iterator[Work]:
    rows, width = (4, 256) if bench.dry else (8192, 16384)
    x, target = normal(bench, rows, width), torch.randint(0, width, (rows,), device=bench.device)
    for op, passes in (("copy", 2), ("softmax", 2), ("cross_entropy", 1), ("rms_norm", 2)):
        yield Work(op, f"{rows} x {width}", (x, target), passes * 2.0 * x.numel(), "GB/s")


def linear_works(bench: Bench) -> Iterator[Work]:
    """The rates of packed_linear are of the bytes of packed weights, also for torch, whose weights are larger."""
    T, K, V = (8, 32, 64) if bench.dry else (8192, 4096, 65536)
    hidden, weight = normal(bench, T, K).requires_grad_(), (normal(bench, V, K) / K**0.5).requires_grad_()
    labels = torch.randint(0, V, (T,), device=bench.device)
    yield Work(
        "linear_cross_entropy", f"{T} x {K} -> {V}, gradients", (hidden, weight, labels), 6.0 * T * K * V, "TFLOP/s"
    )
    for format, block in (("q8_0", 34), ("q4_0", 18)):
        size = 64 if bench.dry else 8192
        w = torch.randn(size, size) / size**0.5
        for rows in (1, 16, 512):
            x = normal(bench, min(rows, 20) if bench.dry else rows, size)
            yield Work(
                "packed_linear",
                f"{format} {size} x {size} {rows} rows",
                (x, w, format),
                size * size * block / 32,
                "GB/s",
            )


def own(call: Callable[[str], Any]) -> dict[str, Call]:
    """The same call on both of foveate's backends for GPUs."""
    return {f"foveate {backend}": partial(call, backend) for backend in ("native", "triton")}


def attention_calls(work: Work) -> dict[str, Call]:
    q, k, v, causal = work.inputs
    if work.op == "backward":
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))

    def sdpa(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal).transpose(
                1, 2
            )

    def flex() -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = None
        if causal:
            mask = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, q.shape[1], k.shape[1], device=q.device.type
            )
        compiled = torch.compile(flex_attention)
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    calls: dict[str, Call] = {"torch flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION)}
    calls |= own(lambda backend: foveate.attention(q, k, v, causal=causal, backend=backend))
    if work.op == "forward":
        calls |= {f"foveate triton {name}": variant(work, block) for name, block in VARIANTS.items()}
    calls |= {
        "torch cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "torch efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
    }
    if q.is_cuda:  # on a CPU it is a compiler of C++ that would be tried
        calls["torch flex"] = flex
    return calls


# Of the forward pass on sm_90: what the table of configs could name. 1 is `config.DESCRIPTORS`, 2 `config.SPECIALIZED`.
VARIANTS = {
    "descriptors 128x128": (128, 128, 8, 2, 1),
    "specialized 128x128": (128, 128, 4, 2, 2),
    "specialized 128x64": (128, 64, 4, 3, 2),
}


def variant(work: Work, block: tuple[int, ...]) -> Call:
    """The forward pass with a config of its own; RuntimeError on other chips."""
    q, k, v, causal = work.inputs

    def call() -> Tensor:
        from foveate._triton import attention, config

        arch = attention.arch(q.device)
        if arch // 10 != 9:
            raise RuntimeError("this variant is for sm_90")
        name = config.key("forward masked" if causal else "forward", q.shape[-1], q.dtype, q.shape[1], arch)
        with config.table_is({name: config.Config(*block)}):
            return foveate.attention(q, k, v, causal=causal, backend="triton")

    return call


def own_calls(work: Work) -> dict[str, Call]:
    """foveate's and torch's; the first one's result is what the others are checked against."""
    if work.op in ("forward", "backward"):
        return attention_calls(work)
    if work.op == "decode paged":
        q, k, v, lens, table = work.inputs
        dense = [x[table.long()].flatten(1, 2) for x in (k, v)]
        return {
            "torch": lambda: F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, *dense)), enable_gqa=True).transpose(1, 2),
            **own(lambda backend: foveate.attention_with_kv_cache(q, k, v, kv_lens=lens, block_table=table, backend=backend)),
        }  # fmt: skip
    if work.op == "packed_linear":
        x, w, format = work.inputs
        layer = foveate.nn.PackedLinear.from_blocks(foveate.linear.quantize(w, format), format, w.shape[1]).to(x.device)
        full = layer.dequantize().to(x.dtype)
        return {
            "torch bf16": lambda: F.linear(x, full),
            "foveate triton": lambda: foveate.packed_linear.packed_linear(
                x, layer.data, format, len(w), backend="triton"
            ),
        }
    if work.op == "linear_cross_entropy":
        hidden, weight, labels = work.inputs

        def grads(loss: Callable[[], Tensor]) -> Tensor:
            return torch.autograd.grad(loss(), (hidden, weight))[0]

        return {
            "torch": lambda: grads(lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels)),
            **own(lambda backend: grads(lambda: foveate.linear_cross_entropy(hidden, weight, labels, backend=backend))),
        }
    x, target = work.inputs
    ones = torch.ones(x.shape[1], dtype=x.dtype, device=x.device)
    return {
        "copy": {"torch": x.clone},
        "softmax": {
            "torch": lambda: torch.softmax(x, -1),
            **own(lambda backend: foveate.softmax(x, backend=backend)),
        },
        "cross_entropy": {
            "torch": lambda: F.cross_entropy(x.float(), target),
            **own(lambda backend: foveate.cross_entropy(x, target, backend=backend)),
        },
        "rms_norm": {
            "torch": lambda: F.rms_norm(x, (x.shape[1],), ones, 1e-6),
            **own(lambda backend: foveate.rms_norm(x, ones, 1e-6, backend=backend)),
        },
    }[work.op]


def measure(bench: Bench, calls: Callable[[Work], dict[str, Call]]) -> list[dict[str, Any]]:
    """The rows of every case that fits the time; what fails or is left out is printed."""
    rows = []
    for work in works(bench):
        if time.monotonic() > bench.deadline:
            print(f"left out, the time is over: {work.op} {work.case}", flush=True)
            continue
        expected = None
        for who, call in calls(work).items():
            try:
                out = call()
                if isinstance(out, Tensor):
                    expected = out.detach() if expected is None else expected
                    tolerance = 3e-2 * float(expected.abs().max())
                    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=tolerance, check_dtype=False)
                if work.op == "backward":
                    call = backward_of(out, work)
                low = milliseconds(bench, call)
            except Exception as error:  # a peer's: the next one is still worth measuring
                print(
                    f"{work.op}, {work.case}, {who}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                    flush=True,
                )
                continue
            rate = work.amount / low[0] * (1e-9 if work.unit == "TFLOP/s" else 1e-6)
            rows.append(dict(zip(FIELDS, (work.op, work.case, who, *low, rate, work.unit))))
            print(f"{work.op:<14} {work.case:<30} {who:<38} {low[0]:9.3f} ms {rate:9.1f} {work.unit}", flush=True)
    return rows


def backward_of(out: Tensor, work: Work) -> Call:
    """The backward pass alone, of the leaves that the forward pass has made its graph of."""
    leaves = sorted({id(x): x for x in _leaves(out)}.values(), key=id)
    dout = torch.randn(out.shape, dtype=out.dtype, device=out.device)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def _leaves(out: Tensor) -> Iterator[Tensor]:
    """The tensors that require a gradient below `out`."""
    pending, seen = [out.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        pending += [parent for parent, _ in node.next_functions]


def write(path: Path, rows: list[dict[str, Any]], device: str, versions: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(row | {"device": device, "versions": versions} for row in rows)


def run_peers(bench: Bench, path: Path) -> None:
    """Each peer that there is a folder for, one process after the other, its rows appended to `path`."""
    folder = os.environ.get("FOVEATE_PEERS") or None
    for peer in PEERS:
        place = None if folder is None else Path(folder) / peer
        if place is None or not place.is_dir():
            print(
                f"{peer}: left out, " + ("FOVEATE_PEERS is not set" if place is None else f"there is no {place}"),
                flush=True,
            )
            continue
        left = bench.deadline - time.monotonic()
        if left < 5:
            print(f"{peer}: left out, the time is over", flush=True)
            continue
        part = path.with_suffix(f".{peer}.csv")
        command = [
            sys.executable,
            str(Path(__file__).with_name("gpu_peers.py")),
            peer,
            str(part),
            "--seconds",
            str(left),
        ]
        search = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            subprocess.run(
                command + ["--dry-run"] * bench.dry,
                env=os.environ | {"PYTHONPATH": search},
                timeout=left + 30,
                check=True,
            )
        except subprocess.SubprocessError as error:
            print(f"{peer}: {error}", flush=True)
        if part.exists():
            lines = part.read_text().splitlines(keepends=True)
            part.unlink()
            with path.open("a", newline="") as file:
                file.writelines(lines[1:])


def arguments(description: str, *names: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    for name in names:
        parser.add_argument(name)
    parser.add_argument("file", type=Path, help="the CSV file to write")
    parser.add_argument("--seconds", type=float, default=280, help="after which no further case begins")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    return parser.parse_args()


def here(bench: Bench, package: str) -> tuple[str, str]:
    """The device, and the versions of torch, triton and the package."""
    import importlib.metadata as metadata

    names = ["torch", "triton", *([] if package == "foveate" else [package])]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return "cpu, dry run" if bench.dry else torch.cuda.get_device_name(), versions


def main() -> None:
    args = arguments("Times foveate's kernels, torch's and other libraries' on one GPU.")
    bench = Bench(args.dry_run, time.monotonic() + args.seconds)
    # Three quarters of the time for foveate and torch, the rest for the peers.
    rows = measure(bench._replace(deadline=time.monotonic() + 0.75 * args.seconds), own_calls)
    write(args.file, rows, *here(bench, "foveate"))
    run_peers(bench, args.file)


if __name__ == "__main__":
    main()
