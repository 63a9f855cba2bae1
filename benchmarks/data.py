"""foveate.data beside datatrove, on one core: MB of text a second of quality rules and of MinHash deduplication.

    python benchmarks/data.py --peer-python path/to/python [--megabytes 50] [--rounds 3] [--input corpus.jsonl] [--out FILE.json]

--peer-python: one with `pip install "datatrove[processing]==0.10.1" spacy orjson` (spaCy parts its English words); without
it, foveate alone is measured. --input: JSON lines with {"id", "text"}; by default prose made from a seed, a tenth of it copied with small
changes. Both read the same uncompressed file and write compressed JSON lines (gzip), each step in a process of its own with one worker;
the two take turns, and the median counts.

clean: the rules of Gopher (quality, repetition), C4 and FineWeb; no repair of Unicode. dedup: whole documents by 5-grams; datatrove's
default of 14 bands of 8 rows, whose threshold is (1/14)^(1/8) = 0.72, and foveate's 128 permutations at the same threshold. Start of the
process and imports are not in the times. The counts of kept documents are printed too: the two part words and sentences differently, and
foveate compares whole signatures where datatrove takes every meeting in a band, so they differ a little.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_FOVEATE = """
import json, sys, time
import foveate.data
step, source, folder = sys.argv[1:]
start = time.perf_counter()
output = f"{folder}/o.jsonl.gz"
if step == "clean":
    found = foveate.data.clean(source, output, unicode=False, whitespace=False, workers=1, progress=False)
else:
    found = foveate.data.dedup(source, output, threshold=0.72, workers=1, progress=False)
print(json.dumps({"seconds": time.perf_counter() - start, "kept": found["kept"]}))
"""
_DATATROVE = """
import contextlib, gzip, json, os, sys, time
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.text import split_into_words
step, source, folder = sys.argv[1:]
split_into_words("The tokenizer is loaded before the time begins.", "eng")
reader = lambda: JsonlReader(os.path.dirname(source), glob_pattern=os.path.basename(source))
writer = lambda: JsonlWriter(f"{folder}/o")
start = time.perf_counter()
with contextlib.redirect_stdout(sys.stderr):
    run = lambda *steps, tasks=1: LocalPipelineExecutor(list(steps), tasks=tasks, workers=1, skip_completed=False,
                                                        logging_dir=f"{folder}/logs").run()
    if step == "clean":
        run(reader(), GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False),
            FineWebQualityFilter(), writer())
    else:
        config = MinhashConfig()
        run(reader(), MinhashDedupSignature(f"{folder}/sig", config))
        run(MinhashDedupBuckets(f"{folder}/sig", f"{folder}/buckets", config=config), tasks=config.num_buckets)
        run(MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config))
        run(reader(), MinhashDedupFilter(f"{folder}/remove"), writer())
seconds = time.perf_counter() - start
kept = sum(sum(1 for _ in gzip.open(f"{folder}/o/{name}")) for name in os.listdir(f"{folder}/o"))
print(json.dumps({"seconds": seconds, "kept": kept}))
"""


def corpus(file: Path, megabytes: float) -> None:
    """Prose of our own making: 5000 words by Zipf's law, 200 to 900 in a document; every tenth document is an earlier one, 2 % changed."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "in", "on", "al")]
    words = ["the", "of", "and", "to", "that", "have", "with", "be"]
    words += ["".join(rng.choice(syllables) for _ in range(rng.randint(1, 4))) for _ in range(5000)]
    weights = [1 / (i + 8) for i in range(len(words))]
    made: list[list[str]] = []
    size = number = 0
    with file.open("w") as out:
        while size < megabytes * 1e6:
            if number % 10 == 9:
                chosen = [word if rng.random() > 0.02 else rng.choice(words) for word in rng.choice(made)]
            else:
                chosen = rng.choices(words, weights, k=rng.randint(200, 900))
                if len(made) < 1000:
                    made.append(chosen)
            lines, at = [], 0
            while at < len(chosen):
                length = rng.randint(20, 60)
                lines.append(" ".join(chosen[at : at + length]).capitalize() + ".")
                at += length
            text = "\n".join(lines).replace(" the of ", ". The ")
            out.write(json.dumps({"id": str(number), "text": text}) + "\n")
            size += len(text)
            number += 1


def measure(python: str, program: str, step: str, source: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([python, "-c", program, step, str(source), folder], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{step} with {python} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", metavar="PATH")
    parser.add_argument("--megabytes", type=float, default=50, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--input", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    engines = {"foveate": (sys.executable, _FOVEATE)}
    if args.peer_python:
        engines["datatrove"] = (args.peer_python, _DATATROVE)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        source = args.input or Path(folder) / "corpus.jsonl"
        if args.input is None:
            corpus(source, args.megabytes)
        size = sum(len(json.loads(line)["text"].encode()) for line in source.open())
        for step in ("clean", "dedup"):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
            for _ in range(args.rounds):
                for name, (python, program) in engines.items():
                    runs[name].append(measure(python, program, step, source.resolve()))
            for name, found in runs.items():
                seconds = statistics.median(run["seconds"] for run in found)
                row = {
                    "step": step,
                    "engine": name,
                    "mb_per_second": round(size / 1e6 / seconds, 2),
                    "kept": found[0]["kept"],
                }
                row["fastest"], row["slowest"] = (round(f(run["seconds"] for run in found), 2) for f in (min, max))
                results.append(row)
                spread = f"{row['fastest']} to {row['slowest']} s"
                print(f"{step:6} {name:10} {row['mb_per_second']:8.2f} MB/s  kept {row['kept']}  {spread}", flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({"megabytes": size / 1e6, "rounds": args.rounds, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
