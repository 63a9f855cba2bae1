"""The generated parts of README.md, between marker lines: the support matrix and the numbers of the newest committed results.

python -m foveate.bench.readme           writes them
python -m foveate.bench.readme --check   fails if they are not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from foveate.bench import report, run, support
from foveate.bench.machine import Machine
from foveate.bench.run import Row

TITLES = {
    "attention": "attention forward",
    "backward": "attention forward + backward",
    "decode": "decode against a KV cache",
    "softmax": "softmax",
    "cross_entropy": "cross-entropy",
    "linear": "packed linear",
    "overhead": "call overhead",
    "memory": "peak memory, forward + backward",
}


def numbers(machine: Machine, rows: Sequence[Row]) -> str:
    """A Markdown table of the summaries, with the machine above it."""
    lines = [
        f"{machine.line}, commit `{machine.commit}`.",
        "",
        "| bench | dtype | beside | cases | ratio, geometric mean | lowest ratio | % of the measured limit (lowest) |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in run.summarize(rows):
        percent = (
            "" if s.mean_percent_of_limit is None else f"{s.mean_percent_of_limit:.0f} ({s.min_percent_of_limit:.0f})"
        )
        lines.append(
            f"| {TITLES[s.bench]} | {s.dtype} | {s.peer} | {s.cases} | {s.mean_ratio:.2f}x | {s.min_ratio:.2f}x | {percent} |"
        )
    exponents = [f"{row.rate:.2f} ({row.dtype})" for row in rows if row.unit == "exponent"]
    if exponents:
        lines += ["", f"Peak memory of forward + backward grows as S to the power of {', '.join(exponents)}."]
    return "\n".join(lines)


def newest_results(folder: Path) -> Path | None:
    """The CSV file of the newest full CPU run: cpu_<date>.csv."""
    return max(folder.glob("cpu_[0-9]*.csv"), default=None)


def with_parts(text: str, parts: dict[str, str]) -> str:
    """`text` with each part between its lines `<!-- NAME: generated ... -->` and `<!-- end of NAME -->`; KeyError without them."""
    lines = text.splitlines()
    for name, part in parts.items():
        begin = [i for i, line in enumerate(lines) if line.startswith(f"<!-- {name}: generated")]
        end = [i for i, line in enumerate(lines) if line == f"<!-- end of {name} -->"]
        if len(begin) != 1 or len(end) != 1 or end[0] < begin[0]:
            raise KeyError(f"README.md needs one '<!-- {name}: generated ... -->' before one '<!-- end of {name} -->'")
        lines[begin[0] + 1 : end[0]] = ["", *part.splitlines(), ""]
    return "\n".join(lines) + "\n"


def generated(root: Path) -> dict[str, str]:
    """The parts, from the backends of this build and from root/benchmarks/results."""
    results = newest_results(root / "benchmarks" / "results")
    if results is None:
        measured = "No results are committed yet; `make bench` measures this machine."
    else:
        rows = report.read_csv(results)
        measured = numbers(rows[0][0], [row for _, row in rows])
        picture = results.with_suffix(".png")
        if picture.exists():
            measured += f"\n\n![ratio of every case]({picture.relative_to(root).as_posix()})"
    generation = max((root / "benchmarks" / "results").glob("generate_[0-9]*.md"), default=None)
    words = "No results are committed yet." if generation is None else generation.read_text().strip()
    return {"support matrix": support.matrix(), "numbers": measured, "generation": words}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes the generated parts of README.md, in the repository's root.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if README.md is not up to date")
    args = parser.parse_args(argv)
    path = Path("README.md")
    text = path.read_text()
    wanted = with_parts(text, generated(Path()))
    if args.check and text != wanted:
        print("README.md is not up to date: run `python -m foveate.bench.readme`", file=sys.stderr)
        return 1
    if not args.check:
        path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
