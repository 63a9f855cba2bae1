"""The generated parts of README.md and docs/support.md, between marker lines: numbers of the newest committed results, tables, a picture.

python tools/readme.py           writes them
python tools/readme.py --check   fails if they are not what would be written
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import peers
import picture
import support_matrix
from foveate.bench import report, run

FILES = ("README.md", "docs/support.md")
PICTURE = "docs/images/cpu.png"
NOTHING = "No results are committed yet; `make bench` measures this machine."

# What the table of peers calls the benches of which it has a line.
SPEED = {
    "attention": "CPU time, forward",
    "backward": "CPU time, forward + backward",
    "decode": "CPU time, decode",
}
PEER_NAMES = {"sdpa": "torch SDPA"}


def newest(folder: Path, pattern: str) -> Path | None:
    """The newest result of a kind: names end in the date."""
    return max(folder.glob(pattern), default=None)


def headline(summaries: Sequence[run.Summary], machine: str, generation: Path | None) -> str:
    """Three numbers and where they come from."""
    found = {(s.bench, s.dtype): s for s in summaries}

    def beside(bench: str, what: str) -> str:
        bf16, fp32 = found[bench, "bf16"], found[bench, "fp32"]
        return (
            f"| **{bf16.mean_ratio:.2g}x** torch SDPA | {what} in bf16: geometric mean of {bf16.cases} cases, lowest "
            f"{bf16.min_ratio:.2g}x. In fp32 {fp32.mean_ratio:.2g}x, lowest {fp32.min_ratio:.2g}x. |"
        )

    lines = [
        "| | |",
        "|---|---|",
        beside("attention", "attention forward"),
        beside("decode", "decoding with a KV cache"),
    ]
    if generation is not None:
        with generation.open(newline="") as file:
            rates = {(r["case"], r["engine"]): float(r["tokens_per_s"]) for r in csv.DictReader(file)}
        one, many = (rates[case, "foveate"] / rates[case, "llama.cpp"] for case in ("decode", "decode_16"))
        lines.append(
            f"| **{one:.2g}x** llama.cpp | SmolLM2-135M in 4-bit blocks, one request: {rates['decode', 'foveate']:.0f} "
            f"tokens/s. With 16 requests at once {many:.2g}x, {rates['decode_16', 'foveate']:.0f} tokens/s. |"
        )
    return "\n".join([*lines, "", f"{machine}."])


def speeds(summaries: Sequence[run.Summary]) -> dict[str, dict[str, float]]:
    """Lines of the table of peers: the time of each peer that was measured over foveate's."""
    lines: dict[str, dict[str, float]] = {}
    for s in summaries:
        if s.bench in SPEED and s.peer in PEER_NAMES:
            lines.setdefault(f"{SPEED[s.bench]}, {s.dtype}", {})[PEER_NAMES[s.peer]] = s.mean_ratio
    return lines


def generated(root: Path) -> dict[str, str]:
    """The parts, from the backends of this build and from root/benchmarks/results."""
    folder = root / "benchmarks" / "results"
    kernels, generation = newest(folder, "cpu_[0-9]*.csv"), newest(folder, "generate_[0-9]*.csv")
    parts = {"support matrix": support_matrix.matrix(), "headline": NOTHING, "numbers": NOTHING, "generation": NOTHING}
    summaries: Sequence[run.Summary] = []
    if kernels is not None:
        rows = report.read_csv(kernels)
        machine, measured = rows[0][0], [row for _, row in rows]
        summaries = run.summarize(measured)
        if {"attention", "decode"} <= {s.bench for s in summaries}:
            parts["headline"] = headline(summaries, machine.line, generation)
        parts["numbers"] = report.summary_markdown(machine, measured)
        if kernels.with_suffix(".png").exists():
            file = kernels.with_suffix(".png").relative_to(root).as_posix()
            parts["numbers"] += f"\n\n[A bar for every case]({file})"
    if generation is not None:
        parts["generation"] = generation.with_suffix(".md").read_text().strip()
    return parts | {"peers": peers.table(speeds(summaries))}


def picture_is_current(root: Path) -> bool:
    folder = root / "benchmarks" / "results"
    sources = [path for path in (newest(folder, "cpu_[0-9]*.csv"), newest(folder, "generate_[0-9]*.csv")) if path]
    return len(sources) < 2 or picture.drawn_from(root / PICTURE) == picture.digest(sources)


def draw_picture(root: Path) -> None:
    folder = root / "benchmarks" / "results"
    kernels, generation = newest(folder, "cpu_[0-9]*.csv"), newest(folder, "generate_[0-9]*.csv")
    if kernels is not None and generation is not None:
        rows = report.read_csv(kernels)
        picture.draw(root / PICTURE, rows[0][0], [row for _, row in rows], kernels, generation)


def with_parts(texts: dict[str, str], parts: dict[str, str]) -> dict[str, str]:
    """The texts of FILES with each part between its lines `<!-- NAME: generated ... -->` and `<!-- end of NAME -->`.

    KeyError unless each part has its place in exactly one of them.
    """
    files = {path: text.splitlines() for path, text in texts.items()}
    for name, part in parts.items():
        begin, end = f"<!-- {name}: generated", f"<!-- end of {name} -->"
        places = [
            (lines, [i for i, line in enumerate(lines) if line.startswith(begin)], lines.index(end))
            for lines in files.values()
            if end in lines
        ]
        if len(places) != 1 or len(places[0][1]) != 1 or places[0][2] < places[0][1][0]:
            raise KeyError(f"one of {', '.join(FILES)} needs one '{begin} ... -->' before one '{end}'")
        [(lines, [first], last)] = places
        lines[first + 1 : last] = ["", *part.splitlines(), ""]
    return {path: "\n".join(lines) + "\n" for path, lines in files.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Writes the generated parts of the documents, in the repository's root."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is not up to date")
    args = parser.parse_args(argv)
    root = Path()
    texts = {path: (root / path).read_text() for path in FILES}
    new = with_parts(texts, generated(root))
    stale = [path for path in FILES if new[path] != texts[path]] + ([] if picture_is_current(root) else [PICTURE])
    if args.check and stale:
        print(f"{' and '.join(stale)}: not up to date, run `python tools/readme.py`", file=sys.stderr)
        return 1
    if not args.check:
        for path in stale:
            if path == PICTURE:
                draw_picture(root)
            else:
                (root / path).write_text(new[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
