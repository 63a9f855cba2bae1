"""`foveate classify`: the class of each text."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from foveate.commands.options import UsageError, add_encoder_option

_EXAMPLES = """\
The texts come from --text, from the lines of --file, or from those of the standard input. The model is a BERT that was fine-tuned to sort
texts, such as one of `foveate train --objective sequence-classification`. A line for each text: the class and its probability.

examples:
  foveate classify --model out/best --text "I liked it." --text "Never again."
  foveate classify --model out/best --json < reviews.txt
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "classify",
        help="the class of each text",
        description="Sorts texts into the classes of a model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_encoder_option(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", action="append", metavar="TEXT", help="may be given several times")
    source.add_argument(
        "--file", type=Path, metavar="FILE", help="a text in each line, in UTF-8; empty lines are left out"
    )
    parser.add_argument("--top-k", type=int, default=1, metavar="N", help="the N most probable classes; 1 by default")
    parser.add_argument(
        "--json", action="store_true", help='one JSON object: {"texts": [{"text", "classes": [{"label", "score"}]}]}'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import foveate

    texts = _texts(args)
    found = foveate.TextClassifier(args.model)(texts, top_k=args.top_k)
    classes = [best if isinstance(best, list) else [best] for best in found]
    if args.json:
        rows = [{"text": text, "classes": best} for text, best in zip(texts, classes)]
        print(json.dumps({"texts": rows}, ensure_ascii=False))
        return
    for best in classes:
        print("\t".join(f"{c['label']} {c['score']:.4f}" for c in best))


def _texts(args: argparse.Namespace) -> list[str]:
    if args.text is not None:
        return args.text
    if args.file is None and sys.stdin.isatty():
        raise UsageError("there is no text; give --text or --file, or pipe lines into the command")
    lines = sys.stdin.read() if args.file is None else args.file.read_text(encoding="utf-8")
    texts = [line for line in lines.splitlines() if line.strip()]
    if not texts:
        raise UsageError("there is no text: all lines are empty")
    return texts
