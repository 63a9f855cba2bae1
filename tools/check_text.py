"""Checks files as pre-commit and `make lint` hand them over: end of file, trailing space, merges, size, and words that the style of this
repository excludes. Prints faults, changes nothing."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

# Words in sources, and what is wrong with them. A reader must not have to search for the noun.
_WORDS = {
    re.compile(rb'^\s*("""|#|//) ?Of (?!course)'): 'begins with "Of" and no noun: say what it is of',
    re.compile(rb"\bleave (\w+ ){1,3}away\b"): "has an idiom that English lacks: the word is omit",
}
_SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh"}


def text_faults(data: bytes) -> list[str]:
    if not data or b"\0" in data:
        return []
    faults = []
    if not data.endswith(b"\n") or data.endswith(b"\n\n"):
        faults.append("does not end in exactly one newline")
    for number, line in enumerate(data.split(b"\n"), 1):
        if line != line.rstrip():
            faults.append(f"line {number} ends in white space")
        if line.startswith((b"<<<<<<< ", b">>>>>>> ")):
            faults.append(f"line {number} is left over from a merge")
    return faults


def word_faults(data: bytes) -> list[str]:
    return [
        f"line {number} {fault}"
        for number, line in enumerate(data.split(b"\n"), 1)
        for pattern, fault in _WORDS.items()
        if pattern.search(line)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-kilobytes", type=int, default=1000, help="the largest file that may be committed")
    parser.add_argument("files", nargs="*", type=Path)
    args = parser.parse_args()
    faults = []
    for path in args.files:
        if path.is_symlink() or not path.is_file():
            continue
        kilobytes = path.stat().st_size // 1000
        if kilobytes > args.max_kilobytes:
            faults.append(f"{path}: {kilobytes} kB, more than {args.max_kilobytes}")
        data = path.read_bytes()
        of_library = path.suffix in _SOURCES and path.parts[0] in ("python", "csrc")
        of_file = text_faults(data) + (word_faults(data) if of_library else [])
        faults += [f"{path}: {fault}" for fault in of_file]
    print("\n".join(faults), file=sys.stderr, end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
