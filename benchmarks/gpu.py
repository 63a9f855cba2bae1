"""Times of the CUDA and Triton kernels beside torch's and other libraries' on one GPU: python benchmarks/gpu.py FILE.csv.

Each result is checked before it is timed, the contestants of a case take turns, and every row is written to the file at once. Percentages
are of the limits measured first, in the same run: a matrix product, a copy, a reduction. The other libraries (`gpu_peers.py`) run in
processes of their own, from the folders named after them in the folder that FOVEATE_PEERS names (`pip install --target
$FOVEATE_PEERS/liger liger-kernel`). --dry-run: tiny shapes on the CPU, to see that everything works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
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
FIELDS = ("op", "case", "who", "ms", "low", "high", "rate", "unit", "percent", "of", "device", "versions", "commit")
ROUNDS = 3  # in which the contestants of a case take turns
Call = Callable[[], Any]
Rows = list[dict[str, Any]]


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
    limit: str | None = None  # the limit whose share it reaches
    graph: bool = False  # replayed from a CUDA graph: the launch would take longer than the work


def milliseconds(bench: Bench, call: Call, graph: bool = False) -> tuple[float, float, float]:
    """Median and the middle 60 % of the runs; do_bench clears L2 before each."""
    if bench.dry:
        start = time.perf_counter()
        call()
        return (1e3 * (time.perf_counter() - start),) * 3
    import triton

    return tuple(
        triton.testing.do_bench(captured(call) if graph else call, warmup=5, rep=25, quantiles=[0.5, 0.2, 0.8])
    )


def captured(call: Call) -> Call:
    """The call as the replay of a CUDA graph."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def works(bench: Bench) -> Iterator[Work]:
    """The cases, the same in every process, the most telling first: inputs come from one seed."""
    torch.manual_seed(0)
    yield from limit_works(bench)
    yield from attention_works(bench, [(128, 8192, True), (128, 8192, False)])
    yield from decode_works(bench)
    yield from row_works(bench)
    yield from linear_works(bench)
    yield from attention_works(bench, [(64, 8192, True), (64, 8192, False), (128, 1024, True), (256, 8192, True)])


def normal(bench: Bench, *shape: int) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)


def limit_works(bench: Bench) -> Iterator[Work]:
    """What the rates are held against: a product of 8192 x 8192 matrices, a copy of 2 GiB, the largest element of them."""
    n, size = (64, 4096) if bench.dry else (8192, 1 << 30)
    yield Work("limit", "product", (normal(bench, n, n), normal(bench, n, n)), 2.0 * n**3, "TFLOP/s")
    x = normal(bench, size)
    yield Work("limit", "copy", (x,), 4.0 * size, "GB/s")
    yield Work("limit", "read", (x.view(torch.int32),), 2.0 * size, "GB/s")


def attention_works(bench: Bench, shapes: list[tuple[int, int, bool]]) -> Iterator[Work]:
    for D, S, causal in shapes:
        case = f"D {D} S {S} {'causal' if causal else 'full'}"
        B, S, H = (1, 64, 2) if bench.dry else (16384 // S, S, 2048 // D)
        q, k, v = (normal(bench, B, S, H, D) for _ in range(3))
        flops = 4 * B * H * S * S * D * (0.5 if causal else 1)
        yield Work("forward", case, (q, k, v, causal), flops, "TFLOP/s", "product")
        yield Work("backward", case, (q, k, v, causal), 2.5 * flops, "TFLOP/s", "product")


def decode_works(bench: Bench) -> Iterator[Work]:
    for B, S in ((1, 1024), (16, 8192), (64, 4096)):
        case = f"B {B} keys {S} heads 32/8 D 128"
        B, S = (2, 64) if bench.dry else (B, S)
        k, v = (normal(bench, B * S // 16, 16, 8, 128) for _ in range(2))
        table = torch.randperm(B * S // 16, device=bench.device).view(B, -1).int()
        lens = torch.full((B,), S, dtype=torch.int32, device=bench.device)
        yield Work(
            "decode paged",
            case,
            (normal(bench, B, 1, 32, 128), k, v, lens, table),
            4.0 * k.numel(),
            "GB/s",
            "read",
            B == 1,
        )


def row_works(bench: Bench) -> Iterator[Work]:
    rows, width = (4, 256) if bench.dry else (8192, 16384)
    x, target = normal(bench, rows, width), torch.randint(0, width, (rows,), device=bench.device)
    for op, passes in (("softmax", 2), ("cross_entropy", 1), ("rms_norm", 2)):
        yield Work(
            op, f"{rows} x {width}", (x, target), passes * 2.0 * x.numel(), "GB/s", "read" if passes == 1 else "copy"
        )


def linear_works(bench: Bench) -> Iterator[Work]:
    """The rates of packed_linear are of the bytes of packed weights, also for torch, whose weights are larger."""
    T, K, V = (8, 32, 64) if bench.dry else (8192, 4096, 65536)
    hidden, weight = normal(bench, T, K).requires_grad_(), (normal(bench, V, K) / K**0.5).requires_grad_()
    labels = torch.randint(0, V, (T,), device=bench.device)
    yield Work(
        "linear_cross_entropy",
        f"{T} x {K} -> {V}, gradients",
        (hidden, weight, labels),
        6.0 * T * K * V,
        "TFLOP/s",
        "product",
    )
    for format, block in (("q8_0", 34), ("q4_0", 18)):
        size = 64 if bench.dry else 8192
        w = torch.randn(size, size) / size**0.5
        layer = foveate.nn.PackedLinear.from_blocks(
            foveate.quantization.gguf_blocks.quantize(w, format), format, size
        ).to(bench.device)
        full = layer.dequantize().to(torch.bfloat16)
        for rows in (1, 16, 512):
            x = normal(bench, min(rows, 20) if bench.dry else rows, size)
            case, limit = f"{format} {size} x {size} {rows} rows", "read" if rows <= 16 else None
            yield Work("packed_linear", case, (x, layer, full), size * size * block / 32, "GB/s", limit)


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

    @functools.cache
    def flex_parts() -> tuple[Any, Any]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        sizes = None, None, q.shape[1], k.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, *sizes, device=q.device.type) if causal else None
        return torch.compile(flex_attention), mask

    def flex() -> Tensor:
        compiled, mask = flex_parts()
        return compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)

    calls: dict[str, Call] = {"torch flash": lambda: sdpa(SDPBackend.FLASH_ATTENTION)}
    calls |= own(lambda backend: foveate.attention(q, k, v, causal=causal, backend=backend))
    if work.op == "forward":
        calls |= {f"foveate triton {name}": variant(work, block) for name, block in VARIANTS.items()}
    calls |= {
        "torch cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
        "torch efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
    }
    if q.is_cuda and q.shape[1::2] == (8192, 128):  # compiling takes seconds; on a CPU a compiler of C++ would be tried
        calls["torch flex"] = flex
    return calls


# Variants of the forward pass on sm_90: what the table of configs could name. 1 is `config.DESCRIPTORS`, 2 `config.SPECIALIZED`.
VARIANTS = {
    "descriptors 128x128": (128, 128, 8, 2, 1),
    "specialized 128x128": (128, 128, 4, 2, 2),
    "specialized 128x64": (128, 64, 4, 3, 2),
}


def variant(work: Work, block: tuple[int, ...]) -> Call:
    """The forward pass with a config of its own; RuntimeError on other chips."""
    q, k, v, causal = work.inputs

    def call() -> Tensor:
        from foveate.backend.triton import attention_launch, config

        arch = attention_launch.arch(q.device)
        if arch // 10 != 9:
            raise RuntimeError("this variant is for sm_90")
        name = config.key("forward masked" if causal else "forward", q.shape[-1], q.dtype, q.shape[1], arch)
        with config.table_is({name: config.Config(*block)}):
            return foveate.attention(q, k, v, causal=causal, backend="triton")

    return call


def own_calls(work: Work) -> dict[str, Call]:
    """foveate's and torch's; the first one's result is what the others are checked against."""
    if work.op == "limit":
        x, *rest = work.inputs
        return {"torch": {"product": lambda: x @ rest[0], "copy": x.clone, "read": lambda: x.max()}[work.case]}
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
        x, layer, full = work.inputs
        packed = partial(foveate.ops.packed_linear.packed_linear, x, layer.data, layer.format, layer.out_features)
        return {"torch bf16": lambda: F.linear(x, full), "foveate triton": lambda: packed(backend="triton")}
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


class Report:
    """Writes and prints rows as they are measured, with their share of the limits that came first or that the file has; of `only`, where
    that is given."""

    def __init__(self, path: Path, device: str, versions: str, only: str | None = None) -> None:
        self.path, self.only, self.limits = path, only, dict[str, float]()
        self.here = {"device": device, "versions": versions, "commit": commit()}
        self.rows: Rows = []
        if path.exists():
            with path.open(newline="") as file:
                self.limits = {row["case"]: float(row["rate"]) for row in csv.DictReader(file) if row["op"] == "limit"}
        else:
            with path.open("w", newline="") as file:
                csv.DictWriter(file, FIELDS).writeheader()

    def add(self, work: Work, who: str, times: tuple[float, float, float]) -> None:
        if who != (self.only or who):
            return
        rate = work.amount / times[0] * (1e-9 if work.unit == "TFLOP/s" else 1e-6)
        if work.op == "limit":
            self.limits[work.case] = rate
        known = work.limit in self.limits
        percent = round(100 * rate / self.limits[work.limit], 1) if known else ""  # type: ignore[index]
        values = (work.op, work.case, who, *times, rate, work.unit, percent, work.limit if known else "")
        row = dict(zip(FIELDS, values)) | self.here
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row)
        share = f"{percent:5} % of {work.limit}" if known else ""
        print(
            f"{work.op:<14} {work.case:<34} {who:<32} {times[0]:9.4f} ms {rate:9.1f} {work.unit:<7} {share}", flush=True
        )


def measure(bench: Bench, calls: Callable[[Work], dict[str, Call]], report: Report) -> None:
    """Every case that fits the time; what fails or is left out is printed."""
    for work in works(bench):
        if time.monotonic() > bench.deadline:
            print(f"left out, the time is over: {work.op} {work.case}", flush=True)
            continue
        ready = checked(work, calls(work))
        times: dict[str, list[tuple[float, float, float]]] = {who: [] for who in ready}
        for _ in range(1 if bench.dry else ROUNDS):
            for who, call in list(ready.items()):
                try:
                    times[who].append(milliseconds(bench, call, work.graph))
                except Exception as error:
                    failed(work, who, error)
                    del ready[who]
        for who in ready:
            report.add(work, who, tuple(map(statistics.median, zip(*times[who]))))  # type: ignore[arg-type]


def checked(work: Work, calls: dict[str, Call]) -> dict[str, Call]:
    """The calls whose results are those of the first, ready to be timed: of a backward pass, the pass alone."""
    ready, expected = {}, list[Tensor]()
    for who, call in calls.items():
        try:
            if work.op == "backward":
                call = backward_of(call())
            out = call()
            found = [x.detach() for x in ((out,) if isinstance(out, Tensor) else out)]
            for x, other in zip(found, expected):
                tolerance = 3e-2 * float(other.abs().max())
                torch.testing.assert_close(x, other, rtol=0, atol=tolerance, check_dtype=False)
            expected = expected or found
            ready[who] = call
        except Exception as error:  # a peer's: the next one is still worth measuring
            failed(work, who, error)
    return ready


def failed(work: Work, who: str, error: Exception) -> None:
    print(f"{work.op}, {work.case}, {who}: {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)


def backward_of(out: Tensor) -> Call:
    """The backward pass alone: the gradients of the leaves that `out` was made of, in the order of their memory."""
    leaves = sorted(_leaves(out), key=Tensor.data_ptr)
    generator = torch.Generator(out.device).manual_seed(1)
    dout = torch.randn(out.shape, dtype=out.dtype, device=out.device, generator=generator)
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


def run_peers(bench: Bench, path: Path) -> None:
    """Each peer that there is a folder for, one process after the other; each appends its rows to `path`."""
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
        command = [
            sys.executable,
            str(Path(__file__).with_name("gpu_peers.py")),
            peer,
            str(path),
            "--seconds",
            str(left),
        ]
        search = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            subprocess.run(
                command + ["--dry-run"] * bench.dry,
                env=os.environ | {"PYTHONPATH": search},
                timeout=left + 20,
                check=True,
            )
        except subprocess.SubprocessError as error:
            print(f"{peer}: {error}", flush=True)


def arguments(description: str, *names: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    for name in names:
        parser.add_argument(name)
    parser.add_argument("file", type=Path, help="the CSV file to write")
    parser.add_argument("--seconds", type=float, default=280, help="after which no further case begins")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    return parser


def here(bench: Bench, package: str) -> tuple[str, str]:
    """The device, and the versions of torch, triton and the package."""
    import importlib.metadata as metadata

    names = ["torch", "triton", *([] if package == "foveate" else [package])]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return "cpu, dry run" if bench.dry else torch.cuda.get_device_name(), versions


def commit() -> str:
    """The commit of the working tree, or what FOVEATE_COMMIT says where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FOVEATE_COMMIT", "unknown")


def main() -> None:
    parser = arguments("Times foveate's kernels, torch's and other libraries' on one GPU.")
    parser.add_argument("--peers", choices=("with", "without", "only"), default="with", help="the other libraries")
    args = parser.parse_args()
    bench = Bench(args.dry_run, time.monotonic() + args.seconds)
    if args.peers != "only":
        args.file.unlink(missing_ok=True)
        # Three quarters of the time for foveate and torch, the rest for the peers.
        share = 0.75 if args.peers == "with" else 1.0
        own = bench._replace(deadline=time.monotonic() + share * args.seconds)
        measure(own, own_calls, Report(args.file, *here(bench, "foveate")))
    if args.peers != "without":
        run_peers(bench, args.file)


if __name__ == "__main__":
    main()
