"""`foveate rerank`: documents in the order in which they answer a query."""

from __future__ import annotations

import argparse
from typing import Any

from foveate.cli.options import add_encoder_option, add_text_options, encoder, lines_or_texts, print_json, text

_EXAMPLES = """\
The documents come from --text, from the lines of --file, or from those of the standard input; empty lines are none. The model is a
cross-encoder: an encoder with one output. A line for each document, best first: its score between 0 and 1, and its text.

examples:
  foveate rerank --model models/reranker --query "What is a fovea?" --text "A part of the retina." --text "A city."
  foveate rerank --model models/reranker --query "Who won?" --top-k 3 --json < passages.txt
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "rerank",
        help="documents by how well they answer a query",
        description="Sorts documents by how well they answer a query.",
        epilog=_EXAMPLES,
    )
    add_encoder_option(parser)
    parser.add_argument("--query", required=True, type=text, metavar="TEXT")
    add_text_options(parser, "a document")
    parser.add_argument("--top-k", type=int, metavar="N", help="the N best only; all by default")
    parser.add_argument("--raw", action="store_true", help="the model's output as the score, not its sigmoid")
    parser.add_argument(
        "--json", action="store_true", help='one JSON object: {"query", "documents": [{"index", "score", "text"}]}'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import foveate

    documents = [line for line in lines_or_texts(args) if line.strip()]
    rank = encoder(foveate.Reranker, args)
    ranked = rank(args.query, documents, top_k=args.top_k, raw=args.raw)
    if args.json:
        print_json({"query": args.query, "documents": ranked})
        return
    for document in ranked:
        print(f"{document['score']:.4f}\t{document['text']}")
