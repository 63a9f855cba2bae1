"""`foveate classify`: the class of each text."""

from __future__ import annotations

import argparse
from typing import Any

from foveate.cli.options import add_encoder_option, add_text_options, encoder, lines_or_texts, print_json

_EXAMPLES = """\
The texts come from --text, from the lines of --file, or from those of the standard input. The model is a BERT or another encoder that was
fine-tuned to sort texts, such as one of `foveate train --objective sequence-classification`. A line for each text: the class and its
probability.

examples:
  foveate classify --model out/best --text "I liked it." --text "Never again."
  foveate classify --model out/best --json < reviews.txt
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "classify",
        help="the class of each text",
        description="Classifies texts by the classes of a model.",
        epilog=_EXAMPLES,
    )
    add_encoder_option(parser)
    add_text_options(parser)
    parser.add_argument("--top-k", type=int, default=1, metavar="N", help="the N most probable classes; 1 by default")
    parser.add_argument(
        "--json", action="store_true", help='one JSON object: {"texts": [{"text", "classes": [{"label", "score"}]}]}'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import foveate

    texts = lines_or_texts(args)
    classifier = encoder(foveate.TextClassifier, args)
    results = iter(classifier([text for text in texts if text.strip()], top_k=args.top_k))
    # an empty line has no class, but its place, so that line n of the output is about line n
    rows = [(text, next(results) if text.strip() else []) for text in texts]
    classes = [best if isinstance(best, list) else [best] for _, best in rows]
    if args.json:
        print_json({"texts": [{"text": text, "classes": best} for text, best in zip(texts, classes)]})
        return
    for best in classes:
        print("\t".join(f"{c['label']} {c['score']:.4f}" for c in best))
