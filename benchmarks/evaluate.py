"""Log-likelihoods of multiple choice: foveate as a model of lm-evaluation-harness beside the harness's own Hugging Face backend.

Usage: python benchmarks/evaluate.py FOLDER [--items 64] [--shots 3] [--threads 2]
FOLDER: a causal checkpoint that transformers opens, both in fp32. Items are made of the bundled facts, each with four choices and a few
shots before it. First the numbers are compared, then both are timed in turns; the ratio is the Hugging Face backend's time over ours.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import torch

from foveate.evaluate.rows import rows
from foveate.evaluate.safety import DATA


def made(items: int, shots: int) -> list[tuple[str, str]]:
    """(context, continuation), four to an item."""
    facts, numbers = rows(DATA / "facts.jsonl"), random.Random(1)
    known = "".join(f"Question: {r['question']}\nAnswer: {r['choices'][r['answer']]}\n\n" for r in facts[:shots])
    found = []
    for i in range(items):
        row = facts[shots + i % (len(facts) - shots)]
        context = f"{known}Note {numbers.randrange(10**6)}.\nQuestion: {row['question']}\nAnswer:"
        found += [(context, f" {choice}") for choice in row["choices"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8, help="of the Hugging Face backend")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from foveate.evaluate.harness import FoveateLM

    models: dict[str, Any] = {
        "foveate": FoveateLM(args.folder, dtype="float32", progress=False),
        "hugging face": HFLM(pretrained=args.folder, dtype="float32", device="cpu", batch_size=args.batch_size),
    }
    pairs = made(args.items, args.shots)
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]
    results = {name: model.loglikelihood(requests, disable_tqdm=True) for name, model in models.items()}
    gap = max(abs(float(a[0]) - float(b[0])) for a, b in zip(*results.values()))
    same = sum(bool(a[1]) == bool(b[1]) for a, b in zip(*results.values()))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.repeats):
        for name, model in models.items():
            start = time.perf_counter()
            model.loglikelihood(requests, disable_tqdm=True)
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(json.dumps({
        "requests": len(pairs), "largest difference": gap, "equal greedy": f"{same}/{len(pairs)}",
        "seconds": {name: round(value, 3) for name, value in medians.items()},
        "spread": {name: round(max(v) - min(v), 3) for name, v in times.items()},
        "ratio": round(medians["hugging face"] / medians["foveate"], 2),
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
