"""The generated parts of README.md and docs/support.md, between marker lines: numbers of the newest committed results, the support matrix.

python tools/readme.py           writes them
python tools/readme.py --check   fails if they are not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import support_matrix
from foveate.bench import report

FILES = ("README.md", "docs/support.md")


def newest_results(folder: Path) -> Path | None:
    """The CSV file of the newest full CPU run: cpu_<date>.csv."""
    return max(folder.glob("cpu_[0-9]*.csv"), default=None)


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


def generated(root: Path) -> dict[str, str]:
    """The parts, from the backends of this build and from root/benchmarks/results."""
    results = newest_results(root / "benchmarks" / "results")
    if results is None:
        measured = "No results are committed yet; `make bench` measures this machine."
    else:
        rows = report.read_csv(results)
        measured = report.summary_markdown(rows[0][0], [row for _, row in rows])
        picture = results.with_suffix(".png")
        if picture.exists():
            measured += f"\n\n![ratio of every case]({picture.relative_to(root).as_posix()})"
    generation = max((root / "benchmarks" / "results").glob("generate_[0-9]*.md"), default=None)
    words = "No results are committed yet." if generation is None else generation.read_text().strip()
    return {"support matrix": support_matrix.matrix(), "numbers": measured, "generation": words}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Writes the generated parts of the documents, in the repository's root."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is not up to date")
    args = parser.parse_args(argv)
    texts = {path: Path(path).read_text() for path in FILES}
    stale = {path: new for path, new in with_parts(texts, generated(Path())).items() if new != texts[path]}
    if args.check and stale:
        print(f"{' and '.join(stale)}: not up to date, run `python tools/readme.py`", file=sys.stderr)
        return 1
    if not args.check:
        for path, text in stale.items():
            Path(path).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
