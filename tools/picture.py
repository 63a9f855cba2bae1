"""The picture of README.md, drawn from committed results, a row for each machine: kernels beside torch's, and a model beside engines."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from foveate.bench.machine import Machine
from foveate.bench.run import Row, geometric_mean

NAMES = {
    "attention": "attention\nforward",
    "backward": "forward +\nbackward",
    "decode": "decode,\nKV cache",
    "cross_entropy": "cross-\nentropy",
    "overhead": "call\noverhead",
    "memory": "memory, fwd\n+ bwd",
}
AHEAD, BEHIND, OTHERS = "#2a6f97", "#c1121f", ("#8d99ae", "#b8c0cc", "#d9dee6")


class Results(Protocol):
    """Of one machine; see tools/readme.py."""

    @property
    def machine(self) -> Machine: ...
    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def kernels(self) -> Path: ...
    @property
    def generation(self) -> Path | None: ...


def digest(shown: Sequence[Results]) -> str:
    """What ties a picture to its data: of the files that it shows and of this one, which draws it."""
    data = hashlib.sha256()
    for path in (*(path for one in shown for path in (one.kernels, one.generation)), Path(__file__)):
        if path is not None:
            data.update(path.read_bytes())
    return data.hexdigest()


def drawn_from(picture: Path) -> str:
    """The digest that `draw` has put into a picture; "" where there is none."""
    from PIL import Image

    if not picture.exists():
        return ""
    with Image.open(picture) as image:
        return image.info.get("Source", "")


def draw(picture: Path, shown: Sequence[Results]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(15, 4.2 * len(shown)), layout="constrained")
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, one in zip(parts, shown):
        left, right = part.subplots(1, 2, width_ratios=(2, 1))
        _draw_kernels(left, one.rows)
        if one.generation is not None:
            _draw_generation(right, one.generation)
        part.suptitle(one.machine.line, fontsize=10)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110, metadata={"Source": digest(shown)})
    pyplot.close(figure)


def _draw_kernels(axis, rows: Sequence[Row]) -> None:
    """For each bench a bar for each dtype, the geometric mean, with a line from the lowest to the highest case."""
    groups: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.ratio is not None:
            groups.setdefault(row.bench, {}).setdefault(row.dtype, []).append(row.ratio)
    width = 0.4
    for place, dtypes in enumerate(groups.values()):
        for number, (dtype, ratios) in enumerate(dtypes.items()):
            x, mean = place + (number - (len(dtypes) - 1) / 2) * width, geometric_mean(ratios)
            color = AHEAD if mean >= 1 else BEHIND
            axis.bar(x, mean - 1, bottom=1, width=width * 0.9, color=color, alpha=1 if dtype == "bf16" else 0.65)
            axis.plot([x, x], [min(ratios), max(ratios)], color="#222222", linewidth=1)
            axis.annotate(f"{mean:.1f}x\n{dtype}", (x, max(*ratios, 1)), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(groups)), [NAMES.get(bench, bench) for bench in groups], fontsize=9)
    axis.set_yscale("log", base=2)
    axis.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"], fontsize=8)
    axis.set_ylim(0.4, 3 * max(max(ratios) for dtypes in groups.values() for ratios in dtypes.values()))
    axis.axhline(1, color="#444444", linewidth=0.8)
    axis.set_title("torch's time over foveate's (memory: peak): mean, lowest, highest case", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _draw_generation(axis, results: Path) -> None:
    """Tokens per second of each engine, in groups of cases."""
    with results.open(newline="") as file:
        records = list(csv.DictReader(file))
    cases = list(dict.fromkeys(record["case"] for record in records))
    engines = list(dict.fromkeys(record["engine"] for record in records))
    width = 0.8 / len(engines)
    for number, engine in enumerate(engines):
        rates = {record["case"]: float(record["tokens_per_s"]) for record in records if record["engine"] == engine}
        places = [place + (number - (len(engines) - 1) / 2) * width for place in range(len(cases))]
        color = AHEAD if engine == "foveate" else OTHERS[(number - 1) % len(OTHERS)]
        bars = axis.bar(places, [rates.get(case, 0.0) for case in cases], width * 0.92, color=color, label=engine)
        axis.bar_label(bars, [f"{rates[case]:.0f}" if case in rates else "" for case in cases], fontsize=7, padding=1)
    names = {"decode": "1 request", "decode_16": "16 requests at once", "prefill": "prompt of 512 tokens"}
    axis.set_xticks(range(len(cases)), [names.get(case, case) for case in cases], fontsize=8)
    axis.set_yscale("log")
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title("SmolLM2-135M, tokens per second", fontsize=9, loc="left")
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper left")
    axis.set_ylim(top=4 * max(float(record["tokens_per_s"]) for record in records))
    axis.spines[["top", "right"]].set_visible(False)
