"""The command `foveate`: text from models, answers, what is installed here, and how fast it is."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import foveate
from foveate.cli import (
    answer,
    bench,
    chat,
    classify,
    convert,
    data,
    embed,
    evaluation,
    fill,
    generate,
    info,
    inspect,
    monitor,
    options,
    rerank,
    search,
    serve,
    summarize,
    train,
    translate,
)
from foveate.cli.options import UsageError
from foveate.cli.parser import CommandParser

COMMANDS = (
    generate,
    chat,
    answer,
    classify,
    embed,
    rerank,
    fill,
    translate,
    summarize,
    convert,
    data,
    train,
    search,
    inspect,
    evaluation,
    serve,
    monitor,
    info,
    bench,
)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, or what a command returns; 1 after an error that a sentence explains, 2 for wrong arguments, 130 after Ctrl-C
    (143: SIGTERM)."""
    _open_streams()
    args = _parser().parse_args(sys.argv[1:] if argv is None else argv)
    try:
        if foveate.COMMAND_LINE and getattr(args, "torch", True):
            with options.loading("foveate"):
                foveate.load_public()
        status = args.run(args)
        sys.stdout.flush()  # a full disk is an error now, not at the exit
    except UsageError as error:
        print(f"foveate: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        signal = getattr(
            error, "signal", None
        )  # of train.interrupt, which says what was kept; else a library may have put in a text
        print(f"foveate: {'interrupted' if signal is None else error}", file=sys.stderr)
        return 128 + (signal or 2)
    except BrokenPipeError:  # the reader, such as head, has seen enough; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        print("foveate: there is not enough memory for this", file=sys.stderr)
        return 1
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        print(f"foveate: {_sentence(error)}", file=sys.stderr)
        return 1
    return status or 0


def _sentence(error: Exception) -> str:
    """The error's own, or of the file system's: which file, and what is wrong with it."""
    if not isinstance(error, OSError) or error.filename is None or not error.strerror:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror[:1].lower()}{error.strerror[1:]}"


def _open_streams() -> None:
    """A stream that the caller has closed is nowhere. What an output cannot spell is written by its number, such as \\U0001f600."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="foveate",
        description="Language models on foveate's attention, softmax and KV-cache kernels. Each command explains itself with --help.",
    )
    parser.add_argument("--version", action="version", version=f"foveate {foveate.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
