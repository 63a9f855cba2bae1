"""`foveate classify`: the class of each text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from foveate.cli.options import UsageError, add_encoder_option, encoder, print_json, read_text, text

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
    )
    add_encoder_option(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", action="append", type=text, metavar="TEXT", help="may be given several times")
    source.add_argument(
        "--file", type=Path, metavar="FILE", help="a text in each line, in UTF-8; an empty line stays one"
    )
    parser.add_argument("--top-k", type=int, default=1, metavar="N", help="the N most probable classes; 1 by default")
    parser.add_argument(
        "--json", action="store_true", help='one JSON object: {"texts": [{"text", "classes": [{"label", "score"}]}]}'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import foveate

    texts = _texts(args)
    classifier = encoder(foveate.TextClassifier, args)
    found = iter(classifier([text for text in texts if text.strip()], top_k=args.top_k))
    # an empty line has no class, but its place, so that line n of the output is about line n
    rows = [(text, next(found) if text.strip() else []) for text in texts]
    classes = [best if isinstance(best, list) else [best] for _, best in rows]
    if args.json:
        print_json({"texts": [{"text": text, "classes": best} for text, best in zip(texts, classes)]})
        return
    for best in classes:
        print("\t".join(f"{c['label']} {c['score']:.4f}" for c in best))


def _texts(args: argparse.Namespace) -> list[str]:
    if args.text is not None:
        return args.text
    if args.file is None and sys.stdin.isatty():
        raise UsageError("there is no text; give --text or --file, or pipe lines into the command")
    texts = read_text(args.file).removesuffix("\n").split("\n")  # splitlines also cuts at U+2028 and form feeds
    if not any(line.strip() for line in texts):
        raise UsageError("there is no text: all lines are empty")
    return texts
