"""`foveate inspect`: what a model does with a text, and what its output rests on."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from foveate.cli.options import MODEL_KINDS, UsageError, add_base_option, loading, print_json, read_text, text

_EXAMPLES = """\
Looks into a causal model (Llama's family, GPT-2) or an encoder (BERT's family, ModernBERT). The text comes from --text, from --file or
from the standard input; a model for question answering takes --question and --context.

What you see: for each token how probable it was and what else could have come; which tokens the last one attends to, by layer; what each
layer would already say (logit lens). --html writes one page that needs no network, with every layer, head and row to choose; --png a
picture; --json everything as one object.

What an output rests on: --gradients (gradient x input) and --integrated-gradients N (in N steps, slower, and their sum is the difference
to a text of mean embeddings) say how much each token added to a score: the logit of the next token, of the class, or of the answer's
start and end. --rollout multiplies the attention of all layers.

examples:
  foveate inspect --model path/to/model --text "The capital of France is" --html page.html
  foveate inspect --model path/to/model --text "The capital of France is" --layers 0-3 --rows -1 --json
  foveate inspect --model ./bert-squad --question "Who won?" --context "Ada won the race." --integrated-gradients 50
  foveate inspect --model ./bert-classes --text "I liked it." --gradients --png why.png
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="attention, logit lens, alternatives and attributions of a text",
        description="Looks into a model while it reads a text.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--model", required=True, metavar="PATH",
        help=MODEL_KINDS,
    )  # fmt: skip
    add_base_option(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=text, metavar="TEXT", help="the text, for a causal model the prompt")
    source.add_argument("--file", type=Path, metavar="FILE", help="a file with the text, in UTF-8")
    parser.add_argument("--text-pair", type=text, metavar="TEXT", help="the second text, for an encoder that reads two")
    parser.add_argument("--question", type=text, metavar="TEXT", help="with --context: a model for question answering")
    parser.add_argument("--context", type=text, metavar="TEXT", help="the text that has the answer")
    what = parser.add_argument_group("what to record")
    what.add_argument("--layers", type=places, metavar="LIST", help="such as 0,3-5,-1; all by default")
    what.add_argument("--heads", type=places, metavar="LIST", help="all by default")
    what.add_argument(
        "--rows", type=places, metavar="LIST", help="tokens whose attention is shown; the last 32 by default"
    )
    what.add_argument("--no-attention", action="store_true", help="leave the attention out")
    what.add_argument("--rollout", action="store_true", help="attention multiplied through all layers")
    what.add_argument(
        "--lens-top", type=int, metavar="N", help="tokens of each layer's logit lens; 3 by default, 0 for none"
    )
    what.add_argument("--top", type=int, default=5, metavar="N", help="alternatives of each token; 5 by default")
    why = parser.add_argument_group("what the output rests on")
    why.add_argument("--gradients", action="store_true", help="gradient x input for each token")
    why.add_argument("--integrated-gradients", type=int, metavar="N", help="integrated gradients in N steps")
    why.add_argument(
        "--target", type=text, metavar="TEXT", help="the token or class to explain; the most probable one by default"
    )
    why.add_argument("--baseline", type=text, metavar="TOKEN", help="of integrated gradients: a token such as [MASK]")
    out = parser.add_argument_group("output")
    out.add_argument("--html", type=Path, metavar="FILE", help="one page of HTML that needs nothing else")
    out.add_argument("--png", type=Path, metavar="FILE", help="a picture")
    out.add_argument("--json", action="store_true", help="one JSON object with everything")
    parser.set_defaults(run=run)


def places(given: str) -> list[int]:
    """0,3-5,-1 as integers."""
    chosen: list[int] = []
    for part in given.split(","):
        first, dash, last = part.strip().rpartition("-")
        try:
            if dash and first and not first.endswith("-"):
                chosen += range(int(first), int(last) + 1)
            else:
                chosen.append(int(part))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{given!r} must be numbers and ranges, such as 0,3-5,-1") from None
    if not chosen:
        raise argparse.ArgumentTypeError(f"{given!r} has no numbers")
    return chosen


def run(args: argparse.Namespace) -> None:
    if (args.question is None) != (args.context is None):
        raise UsageError("--question and --context go together")
    if args.question is not None and (args.text or args.file or args.text_pair):
        raise UsageError("give --question and --context, or a text, not both")
    if args.baseline is not None and args.integrated_gradients is None:
        raise UsageError("--baseline belongs to --integrated-gradients")
    if args.question is None and args.text is None and args.file is None and sys.stdin.isatty():
        raise UsageError("there is no text; give --text or --file, or pipe a text into the command")
    from foveate.models import open_checkpoint

    with loading(args.model):
        from foveate.inspect import Inspector
    inspector = Inspector(open_checkpoint(args.model, args.base))
    kind = inspector.parts.kind
    if kind == "answers" and args.question is None:
        raise UsageError(f"{args.model} answers questions: give --question and --context")
    first = args.question if args.question is not None else args.text if args.text is not None else read_text(args.file)
    second = args.context if args.question is not None else args.text_pair
    inspection = inspector.inspect(
        first, second, attention=not args.no_attention, layers=args.layers, heads=args.heads, rows=args.rows, lens_top=args.lens_top,
        top=args.top, rollout=args.rollout,
    )  # fmt: skip
    methods = [("gradient x input", 1)] if args.gradients else []
    if args.integrated_gradients is not None:
        methods.append(("integrated gradients", args.integrated_gradients))
    for method, steps in methods:
        one = inspector.attribute(
            first, second, method=method, target=args.target, steps=steps,
            baseline=args.baseline if method == "integrated gradients" else None,
        )  # fmt: skip
        if one.token_ids != inspection.token_ids:
            inspection = one  # the window of a long context that the answer is in
            inspection.notes = [f"the window of {len(one.token_ids)} tokens that has the answer; attention is left out"]
        else:
            inspection.attributions, inspection.result = inspection.attributions + one.attributions, one.result
    if args.html is not None:
        inspection.to_html(args.html, f"{Path(args.model).name}: {first[:60]}")
    if args.png is not None:
        inspection.to_png(args.png)
    if args.json:
        print_json(inspection.to_dict())
    else:
        print("\n".join(lines(inspection)))


def lines(inspection: Any) -> list[str]:
    """An inspection for a terminal: a line for each token, then the rest for the last row."""
    header = ["token", *(["log p", "rank", "entropy", "instead"] if inspection.choices else [])]
    header += [f"{one.method}, {one.target}" for one in inspection.attributions]
    rows: list[list[str]] = []
    for i, name in enumerate(inspection.tokens):
        row = [repr(name)]
        if inspection.choices:
            row += _choice(inspection.choices[i])
        rows.append(row + [f"{float(one.values[i]):+.4f}" for one in inspection.attributions])
    if inspection.choices and len(inspection.choices) > len(inspection.tokens):
        rows.append(["(next)", *_choice(inspection.choices[-1]), *[""] * len(inspection.attributions)])
    out = _table([header, *rows])
    if inspection.attention is not None:
        out += ["", f"attention of token {inspection.rows[-1]}, mean of the heads"]
        out += _table(
            [
                [f"layer {n}", *_most(w, inspection)]
                for n, w in zip(inspection.layers, inspection.attention[:, :, -1].mean(1))
            ]
        )
    if inspection.rollout is not None:
        out += ["", f"rollout of token {inspection.rows[-1]}", "  ".join(_most(inspection.rollout[-1], inspection))]
    if inspection.lens is not None:
        out += ["", f"logit lens at token {inspection.rows[-1]}"]
        for n, texts in enumerate(inspection.lens.texts):
            shares = inspection.lens.probabilities[n, -1].tolist()
            best = [f"{name!r} {share:.3f}" for name, share in zip(texts[-1], shares)]
            out.append("  ".join(["embedding" if n == 0 else f"layer {n - 1:<3}", *best]))
    for one in inspection.attributions:
        if one.gap is not None:
            out += ["", f"{one.target}: {one.score:.4f}, of the baseline {one.baseline_score:.4f}, gap {one.gap:+.4f}"]
    if inspection.result is not None:
        out += ["", "  ".join(f"{key}: {value}" for key, value in inspection.result.items())]
    return out


def _choice(choice: Any) -> list[str]:
    if choice is None:
        return ["", "", "", ""]
    own = ["", ""] if choice.logprob is None else [f"{choice.logprob:.3f}", str(choice.rank)]
    others = [f"{name!r} {math.exp(logprob):.3f}" for _, name, logprob in choice.alternatives[:3]]
    return [*own, f"{choice.entropy:.3f}", "  ".join(others)]


def _most(weights: Any, inspection: Any) -> list[str]:
    best = weights.topk(min(4, len(weights)))
    return [f"{i} {inspection.tokens[i]!r} {w:.3f}" for w, i in zip(best.values.tolist(), best.indices.tolist())]


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
