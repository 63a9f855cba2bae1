"""`foveate answer`: the part of a text that answers a question."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from foveate.cli.options import UsageError, add_encoder_option, encoder, print_json, read_text, text

_EXAMPLES = """\
The text comes from --context, from --context-file, or from the standard input. The model is one for extractive question answering, such
as BERT fine-tuned on SQuAD.

examples:
  foveate answer --model ./bert-squad --question "Who won?" --context-file report.txt
  foveate answer --model ./bert-squad --question "Who won?" --question "When?" --json < report.txt
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "answer",
        help="the part of a text that answers a question",
        description="Finds the answer to a question in a text.",
        epilog=_EXAMPLES,
    )
    add_encoder_option(parser)
    parser.add_argument(
        "--question",
        action="append",
        required=True,
        type=text,
        dest="questions",
        metavar="TEXT",
        help="may be given several times",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--context", type=text, metavar="TEXT", help="the text")
    source.add_argument("--context-file", type=Path, metavar="FILE", help="the file with the text, in UTF-8")
    parser.add_argument(
        "--json",
        action="store_true",
        help='one JSON object: {"answers": [{"question", "answer", "score", "start", "end"}]}',
    )
    parser.add_argument("--top-k", type=int, default=1, metavar="N", help="the N best answers; 1 by default")
    parser.add_argument(
        "--max-answer-len", type=int, default=15, metavar="N", help="tokens of an answer; 15 by default"
    )
    parser.add_argument("--doc-stride", type=int, metavar="N", help="tokens that two windows of a long text share")
    parser.add_argument("--impossible", action="store_true", help="an empty line where the text has no answer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import foveate

    context = _context(args)
    answerer = encoder(foveate.QuestionAnswerer, args)
    results = answerer(
        args.questions, context, top_k=args.top_k, max_answer_len=args.max_answer_len, doc_stride=args.doc_stride,
        handle_impossible_answer=args.impossible,
    )  # fmt: skip
    best = [answers if isinstance(answers, list) else [answers] for answers in results]
    rows = [{"question": question, **answer} for question, answers in zip(args.questions, best) for answer in answers]
    if args.json:
        print_json({"answers": rows})
    else:
        for row in rows:
            print(row["answer"])


def _context(args: argparse.Namespace) -> str:
    if args.context is not None:
        return args.context
    if args.context_file is not None:
        return read_text(args.context_file)
    if sys.stdin.isatty():
        raise UsageError("there is no text; give --context or --context-file, or pipe a text into the command")
    return read_text()
