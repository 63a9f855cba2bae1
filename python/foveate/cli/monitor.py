"""`foveate monitor`: a server's numbers in the terminal."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foveate.cli import options

_EXAMPLES = """\
Rates, counts and percentiles are of the last minute; with --once, rates are of one second and the others of the server's whole life.
The same numbers are at /dashboard of the server, for a browser.

examples:
  foveate monitor
  foveate monitor http://127.0.0.1:8000 --every 5
  foveate monitor --once --json | jq .models

exit status: 0, 1 when the server cannot be read at first, 130 after Ctrl-C
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "monitor",
        help="a server's load, times and quality, live in the terminal",
        description="Shows what `foveate serve` says in /metrics, /ready and /canary, again and again.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8000", help="http://127.0.0.1:8000 by default")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between; 2 by default")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    parser.add_argument("--json", action="store_true", help="a JSON object for each reading")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="its first line is the key; or FOVEATE_API_KEY in the environment",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if not args.every > 0:
        raise options.UsageError(f"--every {args.every:g} must be above 0")
    try:
        import prometheus_client  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'foveate monitor needs {error.name}, which is not installed: pip install "foveate[serve]"'
        ) from error
    from foveate.serve.monitor import History, Source, report

    key = os.environ.get("FOVEATE_API_KEY") if args.api_key_file is None else _first_key(args.api_key_file)
    source, history = Source(args.url, key), History(since_start=args.once)
    history.add(source.read())
    if args.once:
        time.sleep(1.0)
        history.add(source.read())
        _show_once(report(history, source.url), args.json)
        return
    if args.json:
        while True:
            options.print_json(report(history, source.url))
            time.sleep(args.every)
            history.add(source.read())
    _live(source, history, args.every)


def _live(source: Any, history: Any, every: float) -> None:
    """Until Ctrl-C. A server that does not answer is waited for."""
    from rich.live import Live

    from foveate.serve.monitor import report

    fault = None
    with Live(auto_refresh=False, screen=True) as live:
        while True:
            live.update(_screen(report(history, source.url), fault), refresh=True)
            time.sleep(every)
            try:
                history.add(source.read())
                fault = None
            except RuntimeError as error:
                fault = str(error)


def _first_key(file: Path) -> str:
    """ValueError for a file of digests, of which the server alone can make use."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    key = next((line for line in lines if line and not line.startswith(("#", "{"))), None)
    if key is None:
        raise ValueError(
            f"{file} has no key itself in a line; the server's file may have digests, from which no key follows"
        )
    return key


def _show_once(reading: dict[str, Any], as_json: bool) -> None:
    if as_json:
        options.print_json(reading)
        return
    from rich.console import Console

    Console().print(_screen(reading))


def _seconds(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.2f}"


# heading, then (label, name of the fact, how it is written, above which it is marked)
_PANELS: tuple[tuple[str, tuple[tuple[str, str, Callable[[float], str], float | None], ...]], ...] = (
    ("Load", (
        ("tokens/s", "tokens_per_s", _number, None), ("prompt tokens/s", "prompt_tokens_per_s", _number, None),
        ("running", "running", _number, None), ("waiting", "waiting", _number, None),
        ("turned away", "turned_away", _number, 0), ("cache in use", "cache_used", _percent, 0.95),
        ("prefix hits", "prefix_hits", _percent, None),
    )),
    ("Times", (
        ("first token p50", "first_token_p50", _seconds, None), ("first token p95", "first_token_p95", _seconds, None),
        ("between tokens p50", "between_tokens_p50", _seconds, None), ("between tokens p95", "between_tokens_p95", _seconds, None),
        ("whole reply p95", "whole_reply_p95", _seconds, None), ("queue p95", "queue_p95", _seconds, None),
        ("step p95", "step_p95", _seconds, None), ("age of the step", "stalled", _seconds, 30),
    )),
    ("Ends", (
        ("stop", "ended_stop", _number, None), ("length", "ended_length", _number, None),
        ("abort", "ended_abort", _number, None), ("error", "ended_error", _number, 0),
        ("failed steps", "failed_steps", _number, 0), ("schemas failed", "schema_failures", _number, 0),
    )),
    ("Quality", (
        ("log-probability", "logprob", _number, None), ("entropy", "entropy", _number, None),
        ("ended by length", "by_length", _percent, None), ("empty", "empty", _percent, 0.1),
        ("repeated", "repeated", _percent, 0.2), ("prompt length PSI", "prompt_length_psi", _number, 0.25),
        ("script PSI", "prompt_script_psi", _number, 0.25), ("thumbs up", "thumbs_up", _number, None),
        ("thumbs down", "thumbs_down", _number, None),
    )),
)  # fmt: skip


def _screen(reading: dict[str, Any], fault: str | None = None) -> Any:
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    ready, canary = reading["ready"]["status"], reading["canary"]["status"]
    head = Text.assemble(
        reading["url"], "  ", (ready, "green" if ready == "ready" else "yellow"), "  canary ",
        (canary, {"same": "green", "off": "dim"}.get(canary, "red")), f"  {(reading['memory_bytes'] or 0) / 2**30:.2f} GiB",
    )  # fmt: skip
    parts: list[Any] = [
        head,
        *([] if fault is None else [Text(f"  {fault}", "red")]),
        *(Text(f"  {reason}", "yellow") for reason in reading["ready"]["waiting_for"]),
    ]
    for model, facts in reading["models"].items():
        panels = []
        for heading, rows in _PANELS:
            table = Table.grid(padding=(0, 2))
            table.add_column(style="dim")
            table.add_column(justify="right", min_width=9)
            for label, name, write, most in rows:
                value = facts[name]
                marked = most is not None and value is not None and value > most
                table.add_row(label, Text("-" if value is None else write(value), "yellow" if marked else ""))
            panels.append(Panel(table, title=heading, title_align="left"))
        parts += [Text(f"\n{model}", "bold"), Columns(panels)]
    return Group(*parts)
