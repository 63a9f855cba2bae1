"""`foveate summarize`: the gist of texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from foveate.cli.options import UsageError, add_encoder_option, encoder, print_json, read_documents, read_text, text
from foveate.cli.translate import add_writing_options, writing

_EXAMPLES = """\
The texts come from DOCUMENTs, from --text, or from the standard input, which is one text. The model is an encoder-decoder that was
fine-tuned for summaries, such as bart-large-cnn, a PEGASUS, or a T5. Lengths are in tokens; the checkpoint's own where none is given.

examples:
  foveate summarize --model models/bart-large-cnn article.txt
  foveate summarize --model models/pegasus-xsum --max-new-tokens 40 --truncate --json *.txt
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "summarize",
        help="the gist of a text",
        description="Summarises texts with an encoder-decoder.",
        epilog=_EXAMPLES,
    )
    add_encoder_option(parser)
    parser.add_argument("documents", nargs="*", type=Path, metavar="DOCUMENT", help="files in UTF-8, each one text")
    parser.add_argument("--text", action="append", type=text, metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--truncate", action="store_true", help="read only the beginning of a text that is too long for the model"
    )
    add_writing_options(parser)
    parser.add_argument("--json", action="store_true", help='one JSON object: {"texts": [{"text", "summary"}]}')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from foveate.pipelines.translation import Summarizer

    if args.documents and args.text is not None:
        raise UsageError("texts come from DOCUMENTs or from --text; omit one of them")
    texts = args.text or read_documents(args.documents) or [read_text()]
    texts = [text.strip() for text in texts]
    if not all(texts):
        raise UsageError("there is no text in one of the inputs: it is empty")
    summarize = encoder(Summarizer, args)
    summaries = summarize(texts, truncate=args.truncate, **writing(args))
    if args.json:
        print_json({"texts": [{"text": given, "summary": made} for given, made in zip(texts, summaries)]})
        return
    for made in summaries:
        print(made)
