"""Tokens per second of a mixture of experts with random weights: the native decoder beside the torch modules.

    python benchmarks/experts.py [--shape qwen3_moe|mixtral] [--quantization q4_0] [--threads 2] [--rounds 5] [--out FILE.csv]

About half a billion weights, of which a token meets a part. Both run the same packed weights, and take turns: in every round each runs
every case once. A result is the median. Greedy decoding of random tokens.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from typing import Any

import torch

import foveate
from foveate.models.experts import ExpertsConfig
from foveate.models.llama import Llama, LlamaConfig
from foveate.models.native_decoder import NativeDecoder
from foveate.nn import PackedLinear

PROMPT, LONG_PROMPT, NEW, MANY = 32, 512, 24, 16
CASES = ("decode", f"decode_{MANY}", "prefill")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_layers": 12, "num_heads": 16, "qk_norm": "rms", "experts": ExpertsConfig(64, 8, 192, normalize=True)},
    "mixtral": {"num_layers": 8, "num_heads": 16, "experts": ExpertsConfig(8, 2, 2560, normalize=True)},
}  # fmt: skip


def model(shape: str, quantization: str) -> Llama:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 3072, "num_kv_heads": 4, "head_dim": 64, "max_positions": 2048,
        "rope_theta": 1e6,
    }  # fmt: skip
    sizes |= SHAPES[shape]
    sizes["windows"] = (None,) * sizes["num_layers"]
    made = Llama(LlamaConfig(**sizes)).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, 0, 0.02)
    for name, module in list(made.named_modules()):
        if isinstance(module, torch.nn.Linear):
            made.set_submodule(name, PackedLinear.from_linear(module, quantization))
    return made


class Runner:
    def __init__(self, runs: Any, config: Any) -> None:
        self.runs = runs
        self.cache = foveate.PagedKVCache(
            128, 16, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim, num_layers=config.num_layers, dtype=torch.float32
        )  # fmt: skip
        self.vocab = config.vocab_size

    def step(self, seqs: list[int], new: torch.Tensor) -> torch.Tensor:
        self.cache.append(seqs, new.shape[1])
        hidden = self.runs.hidden(new, foveate.CacheView(self.cache, seqs, new.shape[1]))
        return self.runs.logits(hidden[:, -1]).argmax(-1, keepdim=True)

    @torch.inference_mode()
    def rate(self, case: str) -> float:
        """Tokens per second."""
        rows = MANY if case == f"decode_{MANY}" else 1
        seqs = [self.cache.create() for _ in range(rows)]
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.vocab, (rows, LONG_PROMPT if case == "prefill" else PROMPT), generator=generator)
        try:
            start = time.perf_counter()
            new = self.step(seqs, prompt)
            if case == "prefill":
                return LONG_PROMPT / (time.perf_counter() - start)
            start = time.perf_counter()
            for _ in range(NEW):
                new = self.step(seqs, new)
            return rows * NEW / (time.perf_counter() - start)
        finally:
            for seq in seqs:
                self.cache.free(seq)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3_moe")
    parser.add_argument("--quantization", choices=["q8_0", "q4_0"], default="q4_0")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", help="a CSV file, which gets a row for each case")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    modules = model(args.shape, args.quantization)
    weights = sum(m.in_features * m.out_features for m in modules.modules() if isinstance(m, PackedLinear))
    runners = {"native": Runner(NativeDecoder(modules), modules.config), "torch": Runner(modules, modules.config)}
    rates: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, runner in runners.items():
            for case in CASES:
                rates.setdefault((name, case), []).append(runner.rate(case))
    print(
        f"{args.shape}, {weights / 1e6:.0f} M packed weights as {args.quantization}, {args.threads} threads, tokens/s"
    )
    rows = []
    for case in CASES:
        native, theirs = (statistics.median(rates[name, case]) for name in runners)
        rows.append(
            [
                args.shape,
                args.quantization,
                args.threads,
                case,
                f"{native:.1f}",
                f"{theirs:.1f}",
                f"{native / theirs:.2f}",
            ]
        )
        print(f"  {case:10} native {native:8.1f}   torch {theirs:8.1f}   {native / theirs:.2f}x")
    if args.out:
        with open(args.out, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["shape", "quantization", "threads", "case", "native", "torch", "times"])
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
