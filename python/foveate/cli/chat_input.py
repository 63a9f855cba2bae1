"""The messages of `foveate chat`: lines of a pipe, or what is typed or pasted in a terminal."""

from __future__ import annotations

import contextlib
import select
import sys
from collections.abc import Iterator

from foveate.cli.options import input_lines

_PAUSE = 0.03  # seconds without input after which a paste is over


def messages() -> Iterator[str]:
    """Each line of a pipe; in a terminal what was entered, a paste as one message. Ctrl-C at the prompt only empties the line."""
    if not sys.stdin.isatty():
        yield from input_lines()
        return
    pastes_are_marked = _readline()
    while True:
        try:
            line = input("> ")
            while not pastes_are_marked and select.select([sys.stdin], [], [], _PAUSE)[0]:
                line += "\n" + input()
            yield line
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)


def _readline() -> bool:
    """Keys for editing and history; whether the terminal's marks around a pasted text keep its lines together (GNU readline 8)."""
    with contextlib.suppress(ImportError):
        import readline

        version = getattr(readline, "_READLINE_LIBRARY_VERSION", "")  # libedit has none
        if "libedit" not in (readline.__doc__ or "") and version and int(version.split(".")[0]) >= 8:
            readline.parse_and_bind("set enable-bracketed-paste on")
            return True
    return False
