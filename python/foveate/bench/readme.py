"""The generated parts of README.md, between marker lines: the support matrix and the numbers of the newest committed results.

python -m foveate.bench.readme           writes them
python -m foveate.bench.readme --check   fails if they are not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from foveate.bench import report, run
from foveate.bench.machine import Machine
from foveate.bench.run import Row

TITLES = {
    "attention": "attention forward",
    "backward": "attention forward + backward",
    "decode": "decode against a KV cache",
    "softmax": "softmax",
    "cross_entropy": "cross-entropy",
    "overhead": "call overhead",
    "memory": "peak memory, forward + backward",
}


def numbers(machine: Machine, rows: Sequence[Row]) -> str:
    """A Markdown table of the summaries, with the machine above it."""
    target = machine.cpu_target
    lines = [
        f"{machine.cpu}, {machine.threads} threads, {target}, torch {machine.torch}, {machine.date}, commit `{machine.commit}`.",
        "",
        "| bench | dtype | beside | cases | ratio, geometric mean | lowest ratio | % of the measured limit (lowest) |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in run.summarize(rows):
        percent = "" if s.mean_percent_of_limit is None else f"{s.mean_percent_of_limit:.0f} ({s.min_percent_of_limit:.0f})"
        lines.append(
            f"| {TITLES[s.bench]} | {s.dtype} | {s.peer} | {s.cases} | {s.mean_ratio:.2f}x | {s.min_ratio:.2f}x | {percent} |"
        )
    exponents = [f"{row.rate:.2f} ({row.dtype})" for row in rows if row.unit == "exponent"]
    if exponents:
        lines += ["", f"Peak memory of forward + backward grows as S to the power of {', '.join(exponents)}."]
    return "\n".join(lines)
