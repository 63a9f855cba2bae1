"""The command `foveate`: text from models, answers, what is installed here, and how fast it is."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import foveate
from foveate.commands import answer, chat, classify, generate, options, search, train
from foveate.commands.options import UsageError, print_json
from foveate.commands.parser import CommandParser

BENCHES = ("attention", "backward", "decode", "softmax", "cross_entropy", "linear", "overhead", "memory")

_BENCH_HELP = """\
benches:
  attention      forward of causal and full self-attention; GFLOP/s, held against the measured multiply-add rate
  backward       forward and backward of the same
  decode         one query token against a KV cache with grouped heads; GB/s, held against the measured read rate
  softmax        rows of 1k to 128k columns; GB/s, held against the measured copy rate
  cross_entropy  the same rows as logits, forward alone and with the gradient
  linear         packed weights times 1, 16 and 512 rows; GB/s of weights read for one row, else GFLOP/s
  overhead       one query, one key: microseconds that a call costs beside its arithmetic
  memory         peak memory of forward and backward by length, each in a process of its own
  all            every one of these
  tune           no bench: measures block sizes of the Triton kernels on this GPU and rewrites their table

Each case is checked against fp64 first: a result that is further off than torch's own allows stops the run. Then foveate and its
peers take turns in one process; the table has the median and the interquartile range. A ratio is the peer's time over
foveate's: above 1 foveate is ahead. The keys of decode come from memory, not from a cache, because the calls rotate over several
copies. --quick runs tiny shapes to see that everything works; its numbers mean nothing.

examples:
  foveate bench attention --against sdpa
  foveate bench decode --dtype bf16 --threads 8
  foveate bench all --out benchmarks/results

The last one writes cpu_<date>.csv, .png and .md to that folder.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 after an error that a sentence explains, 2 for wrong arguments, 130 after Ctrl-C (143: SIGTERM)."""
    _open_streams()
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if foveate.COMMAND_LINE:
            with options.loading("foveate"):
                foveate.load_public()
        args.run(args)
        sys.stdout.flush()  # a full disk is an error now, not at the exit
    except UsageError as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"foveate: {str(error) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "signal", 2)
    except BrokenPipeError:  # the reader, such as head, has seen enough; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print("foveate: there is not enough memory for this", file=sys.stderr)
        return 1
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 1
    return 0


def _open_streams() -> None:
    """A stream that the caller has closed is nowhere. What an output cannot spell is written by its number, such as \\U0001f600."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="foveate",
        description="Language models on foveate's attention, softmax and KV-cache kernels. Each command explains itself with --help.",
    )
    parser.add_argument("--version", action="version", version=f"foveate {foveate.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    generate.add_parser(commands)
    chat.add_parser(commands)
    answer.add_parser(commands)
    classify.add_parser(commands)
    train.add_parser(commands)
    search.add_parser(commands)

    info = commands.add_parser("info", help="what is compiled in, and what this machine can run")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="check and time the kernels beside torch's",
        description="Checks the kernels, then times them beside torch's and the limits of this machine.",
        epilog=_BENCH_HELP,
    )
    bench.add_argument(
        "benches", nargs="+", choices=(*BENCHES, "all", "tune"), metavar="BENCH", help="one or more of those below"
    )
    bench.add_argument(
        "--against",
        choices=("sdpa", "torch", "none"),
        default="sdpa",
        help="sdpa or torch: torch's own function, be it scaled_dot_product_attention, softmax or cross_entropy (the "
        "default); none: foveate alone",
    )
    bench.add_argument(
        "--dtype",
        nargs="+",
        choices=("fp32", "bf16", "fp16"),
        default=["fp32", "bf16"],
        dest="dtypes",
        help="fp32 and bf16 by default",
    )
    bench.add_argument("--quick", action="store_true", help="tiny shapes, few samples: a test of the bench itself")
    bench.add_argument("--threads", type=int, metavar="N", help="as torch.set_num_threads")
    bench.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs; 0 by default")
    bench.add_argument("--json", action="store_true", help="print JSON instead of tables")
    bench.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write there: a CSV file, a picture of the ratios (beside torch), a summary",
    )
    bench.set_defaults(run=_bench)
    return parser


def _info(args: argparse.Namespace) -> None:
    found = foveate.info()
    if args.json:
        print_json(found, indent=1)
    else:
        print(found)


def _bench(args: argparse.Namespace) -> None:
    if "tune" in args.benches:
        if len(args.benches) > 1:
            raise UsageError(
                f"tune stands alone; run {' '.join(b for b in args.benches if b != 'tune')} by another call"
            )
        from foveate.bench import tune

        return tune.main()
    from foveate.bench import machine, report, roofline, run

    benches = BENCHES if "all" in args.benches else tuple(dict.fromkeys(args.benches))
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads {args.threads} must be 1 or more")
        import torch

        torch.set_num_threads(args.threads)
    if not args.json:
        report.need_extra("rich", "the table", "ask for --json")
    if args.out is not None:
        report.need_extra("matplotlib", "the picture of --out", "leave --out away")
        args.out.mkdir(parents=True, exist_ok=True)
    machine.keep_freed_memory()
    here = machine.describe()
    limits = roofline.measure(args.quick)
    options = run.Options(benches, args.dtypes, args.against != "none", args.quick, args.seed)
    name = "cpu_" + ("" if benches == BENCHES else "_".join(benches) + "_") + here.date
    csv_file = None if args.out is None else report.CsvFile(args.out / f"{name}.csv", here)
    rows = []
    for row in run.rows(options, limits):
        rows.append(row)
        if csv_file is not None:
            csv_file.add(row)
        if sys.stderr.isatty():
            print(f"\r\033[K{row.bench} {row.case} {row.dtype}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    summaries = run.summarize(rows)
    if csv_file is not None:
        csv_file.close()
        report.draw(args.out / f"{name}.png", here, rows)
        (args.out / f"{name}.md").write_text(report.summary_markdown(here, rows) + "\n")
    if args.json:
        print(report.json_text(here, limits, rows, summaries))
    else:
        report.print_tables(here, limits, rows, summaries)


if __name__ == "__main__":
    sys.exit(main())
