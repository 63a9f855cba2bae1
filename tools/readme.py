"""The generated parts of README.md and docs/support.md, between marker lines: numbers of the newest committed results of each machine,
tables, a picture.

python tools/readme.py           writes them
python tools/readme.py --check   fails if they are not what would be written
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import peers
import picture
import support_matrix
from foveate.bench import report, run
from foveate.bench.machine import Machine

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


@dataclass(frozen=True)
class Results:
    """What is committed of one machine: the newest full run of `foveate bench`, and of benchmarks/generate.py where there is one."""

    machine: Machine
    rows: Sequence[run.Row]
    kernels: Path
    generation: Path | None

    @property
    def summaries(self) -> Sequence[run.Summary]:
        return run.summarize(self.rows)


def newest(folder: Path, kind: str) -> list[Path]:
    """The newest result of a kind on each machine, the last measured machine first. Names: `Machine.stem`, without a label."""
    dated = [path for path in folder.glob(f"{kind}_*.csv") if path.stem[-10:-6].isdigit() and path.stem[-3] == "-"]
    found: dict[str, Path] = {}
    for path in sorted(dated, key=lambda path: path.stem[-10:], reverse=True):
        found.setdefault(path.stem[:-11], path)
    return list(found.values())


def committed(root: Path) -> list[Results]:
    folder = root / "benchmarks" / "results"
    generation = {path.stem[len("generate_") : -11]: path for path in newest(folder, "generate")}
    results = []
    for path in newest(folder, "cpu"):
        rows = report.read_csv(path)
        machine, measured = rows[0][0], [row for _, row in rows]
        results.append(Results(machine, measured, path, generation.get(path.stem[len("cpu_") : -11])))
    return results


def headline(results: Sequence[Results]) -> str:
    """Three pairs of numbers for each machine, and where they come from."""
    lines: dict[str, list[str]] = {}
    for here in results:
        found = {(s.bench, s.dtype): s for s in here.summaries}
        for bench, what in (("attention", "attention forward"), ("decode", "decoding with a KV cache")):
            for dtype in ("bf16", "fp32"):
                s = found[bench, dtype]
                cell = f"**{s.mean_ratio:.2g}x**, lowest {s.min_ratio:.2g}x"
                lines.setdefault(f"{what}, {dtype}, beside torch SDPA", []).append(cell)
        rates = {}
        if here.generation is not None:
            with here.generation.open(newline="") as file:
                rates = {(r["case"], r["engine"]): float(r["tokens_per_s"]) for r in csv.DictReader(file)}
        for case, what in (("decode", "one request"), ("decode_16", "16 requests at once")):
            ours, theirs = rates.get((case, "foveate")), rates.get((case, "llama.cpp"))
            cell = "" if ours is None else f"{ours:.0f} tokens/s"
            if ours is not None and theirs is not None:
                cell = f"**{ours / theirs:.2g}x**, {cell}"
            lines.setdefault(f"SmolLM2-135M in 4-bit blocks, {what}, beside llama.cpp", []).append(cell)
    table = [f"| | {' | '.join(here.machine.name for here in results)} |", "|---" * (len(results) + 1) + "|"]
    table += [f"| {what} | {' | '.join(cells)} |" for what, cells in lines.items()]
    machines = "; ".join(here.machine.line for here in results)
    note = "Ratios are geometric means over the cases of `foveate bench`; an empty cell was not measured."
    return "\n".join([*table, "", f"{machines}.", note])


def speeds(results: Sequence[Results]) -> dict[str, dict[str, float]]:
    """Lines of the table of peers: the time of each peer that was measured over foveate's."""
    lines: dict[str, dict[str, float]] = {}
    for here in results:
        for s in here.summaries:
            if s.bench in SPEED and s.peer in PEER_NAMES:
                title = f"{SPEED[s.bench]}, {s.dtype}, {here.machine.name}"
                lines.setdefault(title, {})[PEER_NAMES[s.peer]] = s.mean_ratio
    return lines


def generated(root: Path) -> dict[str, str]:
    """The parts, from the backends of this build and from root/benchmarks/results."""
    results = committed(root)
    parts = {"support matrix": support_matrix.matrix(), "headline": NOTHING, "numbers": NOTHING, "generation": NOTHING}
    if results:
        parts["headline"] = headline(results)
        numbers = []
        for here in results:
            numbers.append(report.summary_markdown(here.machine, here.rows))
            if here.kernels.with_suffix(".png").exists():
                file = here.kernels.with_suffix(".png").relative_to(root).as_posix()
                numbers.append(f"[A bar for every case]({file})")
        parts["numbers"] = "\n\n".join(numbers)
    generation = [here.generation for here in results if here.generation is not None]
    if generation:
        parts["generation"] = "\n\n".join(path.with_suffix(".md").read_text().strip() for path in generation)
    return parts | {"peers": peers.table(speeds(results))}


def drawn(root: Path) -> list[Results]:
    """The machines of the picture: those with a run of generation."""
    return [here for here in committed(root) if here.generation is not None]


def picture_is_current(root: Path) -> bool:
    shown = drawn(root)
    return not shown or picture.drawn_from(root / PICTURE) == picture.digest(shown)


def draw_picture(root: Path) -> None:
    if shown := drawn(root):
        picture.draw(root / PICTURE, shown)


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
