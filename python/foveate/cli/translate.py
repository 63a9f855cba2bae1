"""`foveate translate`: texts in another language."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from foveate.cli.options import (
    UsageError,
    add_encoder_option,
    add_text_options,
    encoder,
    lines_or_texts,
    print_json,
    read_documents,
)

_EXAMPLES = """\
The texts come from --text, from the lines of --file, or from those of the standard input; DOCUMENTs are files that are each read as one
text. Lines stay lines; each is divided at its sentences. A model of one pair of languages (Marian) needs no --from and --to; others name
languages by codes of their own: deu_Latn (NLLB), de (M2M-100), de_DE (mBART). --languages lists them.

examples:
  foveate translate --model models/opus-mt-en-de --text "The house is small."
  foveate translate --model models/nllb-200 --from eng_Latn --to deu_Latn --json letter.txt
  foveate translate --model models/nllb-200 --languages
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "translate",
        help="a text in another language",
        description="Translates texts with an encoder-decoder.",
        epilog=_EXAMPLES,
    )
    add_encoder_option(parser)
    add_text_options(parser)
    parser.add_argument("documents", nargs="*", type=Path, metavar="DOCUMENT", help="files in UTF-8, each one text")
    parser.add_argument("--from", dest="source", metavar="CODE", help="the texts' language")
    parser.add_argument("--to", dest="target", metavar="CODE", help="the language to translate into")
    parser.add_argument("--languages", action="store_true", help="print the codes that the model knows, and end")
    parser.add_argument("--whole", action="store_true", help="read each text at once instead of sentence by sentence")
    add_writing_options(parser)
    parser.add_argument("--json", action="store_true", help='one JSON object: {"texts": [{"text", "translation"}]}')
    parser.set_defaults(run=run)


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """What `writing` reads: how an encoder-decoder makes its outputs. What is not given is the checkpoint's."""
    parser.add_argument(
        "--num-beams", type=int, metavar="N", help="search with N beams; the checkpoint's own by default"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="the most tokens of an output")
    parser.add_argument("--min-new-tokens", type=int, metavar="N", help="the fewest tokens of an output")
    parser.add_argument("--length-penalty", type=float, metavar="X", help="of beams: above 0 favours longer outputs")
    parser.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens come twice; 0: off")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="texts at a time; 8 by default")


def writing(args: argparse.Namespace) -> dict[str, Any]:
    names = ("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "no_repeat_ngram_size")
    return {"batch_size": args.batch_size} | {
        name: getattr(args, name) for name in names if getattr(args, name) is not None
    }


def documents_or_texts(args: argparse.Namespace) -> list[str]:
    """The files DOCUMENT, each as one text, or what `lines_or_texts` reads."""
    if not args.documents:
        return lines_or_texts(args)
    if args.text is not None or args.file is not None:
        raise UsageError("texts come from DOCUMENTs or from --text and --file; omit one of them")
    return [text.removesuffix("\n") for text in read_documents(args.documents)]


def run(args: argparse.Namespace) -> None:
    from foveate.pipelines.translation import Translator

    texts = [] if args.languages else documents_or_texts(args)
    translate = encoder(lambda model: Translator(model, args.source, args.target), args)
    if args.languages:
        codes = translate.text2text.languages
        if not codes:
            raise ValueError(
                f"{args.model} is not told languages: it translates between the two that it was trained for"
            )
        print("\n".join(codes))
        return
    translations = translate(texts, whole=args.whole, **writing(args))
    if args.json:
        print_json({"texts": [{"text": text, "translation": made} for text, made in zip(texts, translations)]})
        return
    for made in translations:
        print(made)
