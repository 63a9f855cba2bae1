"""Options that the commands of `foveate data` share, and what they print."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from foveate.cli.options import UsageError, print_json

COMMON = ("text_field", "documents", "workers", "bad_rows", "removed", "report", "restart", "overwrite")


def parser_of(
    commands: Any, name: str, help: str, description: str, epilog: str, *, paths: str = "files and folders"
) -> Any:
    """A parser with the input."""
    parser = commands.add_parser(name, help=help, description=description, epilog=epilog)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=paths)
    # no tensors, so no torch, which takes two seconds to load
    parser.set_defaults(torch=False)
    return parser


def add_input(parser: Any) -> None:
    group = parser.add_argument_group("input")
    group.add_argument(
        "--text-field", default="text", metavar="NAME", help='the field that holds the text; "text" by default'
    )
    group.add_argument(
        "--documents", choices=("pieces", "paragraphs", "lines"), default="pieces",
        help="how .txt files are divided: pieces (the default) of about 64 thousand characters, as training cuts them; paragraphs, parted "
        "by empty lines; lines",
    )  # fmt: skip


def add_reading(parser: Any) -> None:
    """What the commands that work on all cores have beside the input."""
    add_input(parser)
    group = parser.add_argument_group("run")
    group.add_argument("--workers", type=int, metavar="N", help="processes; by default as many as there are cores")
    group.add_argument(
        "--bad-rows", choices=("stop", "remove"), default="stop",
        help="at a row that cannot be read, or has no text: stop (the default) with its file and row, or remove it",
    )  # fmt: skip


def add_writing(
    parser: Any, *, removes: bool = True, output: str = "the file to write; its name says the format"
) -> None:
    if removes:
        add_reading(parser)
    else:
        add_input(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--output", required=True, metavar="PATH", help=output)
    if removes:
        group.add_argument(
            "--removed",
            metavar="FILE",
            help="what is removed, with its reason; by default NAME.removed.jsonl beside the output",
        )
        group.add_argument(
            "--report", metavar="FILE", help="an HTML page with the counts, and documents before and after"
        )
    group.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    group.add_argument("--restart", action="store_true", help="begin anew, instead of going on with an interrupted run")


def add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object with all counts")


def common(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in COMMON if hasattr(args, name)}


def call(name: str, *arguments: Any, **options: Any) -> dict[str, Any]:
    """foveate.data.NAME(...)"""
    return getattr(importlib.import_module("foveate.data"), name)(*arguments, **options)


def print_counts(
    args: argparse.Namespace, report: Mapping[str, Any], lines: Callable[[Mapping[str, Any]], list[str]] | None = None
) -> None:
    """One object, or a few lines."""
    if args.json:
        print_json(report)
        return
    print("\n".join((lines or _written)(report)))


def _written(report: Mapping[str, Any]) -> list[str]:
    """Lines about what a command that removes has done."""
    seconds, size = max(report["seconds"], 1e-3), report["bytes_in"]
    lines = [
        f"{report['documents']:,} documents: {report['kept']:,} kept ({report['changed']:,} changed), {report['removed']:,} removed",
        f"{size / 1e6:,.1f} MB of text became {report['bytes_out'] / 1e6:,.1f} MB in {seconds:.1f} s, {size / 1e6 / seconds:,.1f} MB/s",
    ]
    for title, counts in (("removed", report["reasons"]), ("done", report["labels"])):
        if counts:
            lines.append(f"{title}:")
            lines += table(
                [(name, f"{count:,}") for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
            )
    for name, count in report.get("outputs", {}).items():
        lines.append(f"{name}: {count:,} documents")
    if "outputs" not in report:
        lines.append(f"output: {report['output']}")
    lines.append(f"removed: {report['removed_file']}")
    return lines + [f"{name}: {report[name]}" for name in ("report", "hits") if name in report]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            ["", row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        ).rstrip()
        for row in rows
    ]


def numbers(given: list[str] | None, flag: str) -> dict[str, float]:
    """{NAME: NUMBER} of the texts NAME=NUMBER."""
    values: dict[str, float] = {}
    for text in given or []:
        name, _, value = text.rpartition("=")
        try:
            values[name] = float(value)
        except ValueError:
            raise UsageError(f"{flag} {text!r} must be NAME=NUMBER") from None
        if not name:
            raise UsageError(f"{flag} {text!r} must be NAME=NUMBER")
    return values
