"""`foveate fill`: what stands at the mask of each text."""

from __future__ import annotations

import argparse
from typing import Any

from foveate.cli.options import UsageError, add_encoder_option, add_text_options, encoder, lines_or_texts, print_json

_EXAMPLES = """\
The texts come from --text, from the lines of --file, or from those of the standard input. The model is a masked language model; each text
has one of its masks, [MASK] for BERT and <mask> for RoBERTa, or several. A line for each mask: the most probable tokens.

examples:
  foveate fill --model models/bert-base-uncased --text "The sky is [MASK]."
  foveate fill --model models/roberta-base --top-k 1 --json < texts.txt
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "fill",
        help="what stands at the mask of a text",
        description="Fills the masks of texts with a masked language model.",
        epilog=_EXAMPLES,
    )
    add_encoder_option(parser)
    add_text_options(parser)
    parser.add_argument("--top-k", type=int, default=5, metavar="N", help="the N most probable tokens; 5 by default")
    parser.add_argument(
        "--json", action="store_true",
        help='one JSON object: {"texts": [{"text", "masks": [[{"score", "token", "token_str", "sequence"}]]}]}',
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import foveate

    texts = [line for line in lines_or_texts(args) if line.strip()]
    if args.top_k < 1:
        raise UsageError(f"--top-k {args.top_k} must be 1 or more")
    fill = encoder(foveate.FillMask, args)
    masks = [
        predictions if isinstance(predictions[0], list) else [predictions]
        for predictions in fill(texts, top_k=args.top_k)
    ]
    if args.json:
        print_json({"texts": [{"text": line, "masks": predictions} for line, predictions in zip(texts, masks)]})
        return
    for predictions in masks:
        for tokens in predictions:
            print("\t".join(f"{token['token_str'].strip()} {token['score']:.4f}" for token in tokens))
