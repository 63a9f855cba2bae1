"""Rows -> a table on the terminal or in Markdown, a CSV file, a picture, a JSON text."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from foveate.bench.machine import Machine
from foveate.bench.roofline import Limits
from foveate.bench.run import Row, Summary, summarize

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

COLUMNS = [field.name for kind in (Machine, Row) for field in dataclasses.fields(kind)]


def need_extra(module: str, purpose: str, otherwise: str) -> None:
    """Raises ImportError, naming the extra, if `module` is not installed."""
    if importlib.util.find_spec(module) is None:
        raise ImportError(f"{purpose} needs {module}: pip install 'foveate[bench]', or {otherwise}")


class CsvFile:
    """Each row is on the disk when it has been measured."""

    def __init__(self, path: Path, machine: Machine) -> None:
        self._file: TextIO = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        self._machine = dataclasses.asdict(machine)
        self._writer.writeheader()

    def add(self, row: Row) -> None:
        values = {name: _short(value) for name, value in dataclasses.asdict(row).items()}
        self._writer.writerow(self._machine | values)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_csv(path: Path) -> list[tuple[Machine, Row]]:
    """What CsvFile wrote."""
    out = []
    with path.open(newline="") as file:
        for record in csv.DictReader(file):
            machine = Machine(**{f.name: _parse(f.type, record[f.name]) for f in dataclasses.fields(Machine)})
            out.append((machine, Row(**{f.name: _parse(f.type, record[f.name]) for f in dataclasses.fields(Row)})))
    return out


def _short(value: Any) -> Any:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value


def _parse(annotation: Any, text: str) -> Any:
    kind = str(annotation).partition(" ")[0]
    if kind == "str":
        return text
    return None if text == "" else (int(text) if kind == "int" else float(text))


def json_text(machine: Machine, limits: Limits, rows: Sequence[Row], summaries: Sequence[Summary]) -> str:
    return json.dumps(
        {
            "machine": dataclasses.asdict(machine),
            "limits": limits._asdict(),
            "rows": [dataclasses.asdict(row) for row in rows],
            "summary": [dataclasses.asdict(summary) for summary in summaries],
        },
        indent=1,
    )


def limits_line(machine: Machine, limits: Limits) -> str:
    return (
        f"{machine.line}. Limits of this run: "
        f"{limits.fp32_gflops:.0f} GFLOP/s fp32, {limits.bf16_gflops:.0f} bf16, "
        f"{limits.read_gbs:.1f} GB/s read, {limits.copy_gbs:.1f} GB/s copied."
    )


def print_tables(machine: Machine, limits: Limits, rows: Sequence[Row], summaries: Sequence[Summary]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    # a narrow terminal may wrap the lines; a pipe has no width, so nothing is cut off
    console.width = max(console.width, 120) if console.is_terminal else 1000
    console.print(limits_line(machine, limits), highlight=False, soft_wrap=True)
    for bench in dict.fromkeys(row.bench for row in rows):
        cells = [_cells(row) for row in rows if row.bench == bench]
        used = [header for header in cells[0] if any(c[header] for c in cells)]
        console.print(_table(Table, bench, used, [[c[header] for header in used] for c in cells]))
    if summaries:
        headers = ("bench", "dtype", "beside", "cases", "ratio", "lowest", "% of limit", "lowest")
        lines = [
            [s.bench, s.dtype, s.peer, str(s.cases), f"{s.mean_ratio:.2f}x", f"{s.min_ratio:.2f}x",
             _percent(s.mean_percent_of_limit), _percent(s.min_percent_of_limit)]
            for s in summaries
        ]  # fmt: skip
        console.print(_table(Table, "geometric means", headers, lines))


def summary_markdown(machine: Machine, rows: Sequence[Row]) -> str:
    """A table of the summaries in Markdown, with the machine above it."""
    lines = [
        f"{machine.line}, commit `{machine.commit}`.",
        "",
        "| bench | dtype | beside | cases | ratio, geometric mean | lowest ratio | % of the measured limit (lowest) |",
        "|---|---|---|---|---|---|---|",
    ]
    for s in summarize(rows):
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


def _table(kind: Any, title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> Any:
    table = kind(title=title, title_justify="left")
    for header in headers:
        left = header in ("bench", "case", "dtype", "beside", "note")
        table.add_column(header, justify="left" if left else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _cells(row: Row) -> dict[str, str]:
    def number(value: float | None, form: str = ",.1f") -> str:
        return "" if value is None else format(value, form)

    return {
        "case": row.case,
        "dtype": row.dtype,
        "µs": "" if row.us is None else f"{row.us:,.1f} ± {row.spread_us:,.1f}",
        "peak MiB": number(row.peak_mib),
        "rate": "" if row.rate is None else f"{row.rate:,.2f} {row.unit}",
        "% of limit": _percent(row.percent_of_limit),
        "beside": row.peer,
        "its µs": number(row.peer_us),
        "its peak": number(row.peer_peak_mib),
        "ratio": "" if row.ratio is None else f"{row.ratio:.2f}x",
        "note": row.note,
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def draw(path: Path, machine: Machine, rows: Sequence[Row]) -> None:
    """One panel for each bench, one bar for each case: the ratio to its peer. No file if no row has a peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.ratio is not None:
            panels.setdefault(row.bench, []).append(row)
    if not panels:
        return
    heights = [0.8 + 0.2 * len(members) for members in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, sum(heights) + 0.6), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axis, (bench, members) in zip(axes[:, 0], panels.items()):
        labels = [f"{r.case} {r.dtype}" for r in members]
        places = range(len(members))
        ratios = [r.ratio or 0.0 for r in members]
        bars = axis.barh(places, ratios, color=["#2a6f97" if r >= 1 else "#c1121f" for r in ratios], height=0.7)
        axis.bar_label(bars, [_bar_label(r) for r in members], padding=3, fontsize=7)
        axis.set_yticks(places, labels, fontsize=7)
        axis.invert_yaxis()
        axis.axvline(1.0, color="#444444", linewidth=0.8)
        axis.set_xlim(0, 1.3 * max(1.0, *ratios))
        axis.set_title(
            f"{bench}: {'peak memory' if bench == 'memory' else 'time'} of {members[0].peer} / foveate",
            fontsize=9,
            loc="left",
        )
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(machine.line, fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _bar_label(row: Row) -> str:
    percent = _percent(row.percent_of_limit)
    return f"{row.ratio:.2f}x" + (f", {percent} of the limit" if percent else "")
