"""foveate bench: checks the kernels, then times them beside torch's and the limits of this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from foveate.cli.options import UsageError

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


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="check and time the kernels beside torch's",
        description="Checks the kernels, then times them beside torch's and the limits of this machine.",
        epilog=_BENCH_HELP,
    )
    parser.add_argument(
        "benches", nargs="+", choices=(*BENCHES, "all", "tune"), metavar="BENCH", help="one or more of those below"
    )
    parser.add_argument(
        "--against",
        choices=("sdpa", "torch", "none"),
        default="sdpa",
        help="sdpa or torch: torch's own function, be it scaled_dot_product_attention, softmax or cross_entropy (the "
        "default); none: foveate alone",
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=("fp32", "bf16", "fp16"),
        default=["fp32", "bf16"],
        dest="dtypes",
        help="fp32 and bf16 by default",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few samples: a test of the bench itself")
    parser.add_argument("--threads", type=int, metavar="N", help="as torch.set_num_threads")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random inputs; 0 by default")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write there: a CSV file, a picture of the ratios (beside torch), a summary",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
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
        report.need_extra("matplotlib", "the picture of --out", "omit --out")
        args.out.mkdir(parents=True, exist_ok=True)
    machine.keep_freed_memory()
    here = machine.describe()
    limits = roofline.measure(args.quick)
    options = run.Options(benches, args.dtypes, args.against != "none", args.quick, args.seed)
    name = here.stem("cpu", "" if benches == BENCHES else "_".join(benches))
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
