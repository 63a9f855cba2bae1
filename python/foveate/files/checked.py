"""What every reader of a file from outside goes through: regular files of bounded size, JSON, and values against a declared schema.

Nothing here trusts a file: a FIFO or a device is not opened, JSON nested without end is refused, and a value is compared with what its
key allows before anything uses it. All say `CheckpointError`, with the file, the key, the value and what is allowed.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

MOST_TEXT = 2**28  # bytes of a JSON or text file: the largest tokenizers have some 40 MB


class CheckpointError(ValueError):
    """A file of a model, tokenizer, adapter or run that cannot be used: damaged, hostile, or of a kind that is not read."""


class Rule(NamedTuple):
    """allowed: what a value must be, in words. wrong: None for such a value, else (what follows the key, the value, what is allowed)."""

    allowed: str
    wrong: Callable[[Any], tuple[str, Any, str] | None]


def rule(allowed: str, fits: Callable[[Any], bool]) -> Rule:
    return Rule(allowed, lambda value: None if fits(value) else ("", value, allowed))


def integer(low: int, high: int) -> Rule:
    return rule(
        f"an integer from {low} to {high}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
    )


def number(low: float, high: float) -> Rule:
    def fits(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        return low <= value <= high and math.isfinite(value)  # an int beyond a float's range fails the first

    return rule(f"a number from {low:g} to {high:g}", fits)


def text(*choices: str) -> Rule:
    if choices:
        return rule(f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices)
    return rule("a text", lambda v: isinstance(v, str))


def flag() -> Rule:
    return rule("true or false", lambda v: v is True or v is False)


def mapping(keys: Mapping[str, Rule] | None = None, required: tuple[str, ...] = ()) -> Rule:
    """An object whose values under `keys` follow their rules; other keys are free, and null stands for a key that is not there."""
    allowed = "an object" + (f" with {' and '.join(required)}" if required else "")

    def wrong(value: Any) -> tuple[str, Any, str] | None:
        if not isinstance(value, dict) or any(value.get(name) is None for name in required):
            return "", value, allowed
        for name, inner in (keys or {}).items():
            if value.get(name) is not None and (fault := inner.wrong(value[name])):
                return f".{name}{fault[0]}", *fault[1:]
        return None

    return Rule(allowed, wrong)


def list_of(inner: Rule, most: int = 2**24) -> Rule:
    allowed = f"a list of at most {most} values, each {inner.allowed}"

    def wrong(value: Any) -> tuple[str, Any, str] | None:
        if not isinstance(value, list) or len(value) > most:
            return "", value, allowed
        for i, item in enumerate(value):
            if fault := inner.wrong(item):
                return f"[{i}]{fault[0]}", *fault[1:]
        return None

    return Rule(allowed, wrong)


def either(*rules: Rule) -> Rule:
    return rule(" or ".join(r.allowed for r in rules), lambda v: any(r.wrong(v) is None for r in rules))


def check(values: Mapping[str, Any], schema: Mapping[str, Rule], where: Any) -> None:
    """CheckpointError for the first value that its key does not allow. Keys that are absent or null, and unknown ones, are left alone."""
    for key, expected in schema.items():
        if values.get(key) is not None and (fault := expected.wrong(values[key])):
            path, value, allowed = fault
            raise CheckpointError(f"{where} has {key}{path}={shown(value)}; it must be {allowed}")


def shown(value: Any) -> str:
    """repr in at most 60 characters, also of what has none."""
    try:
        written = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; lists without end
        return f"<{type(value).__name__}>"
    return written if len(written) <= 60 else f"{written[:57]}..."


def is_there(file: Path) -> bool:
    """Whether a regular file, or a link to one, is there. CheckpointError for a folder, a FIFO, a device or a link that leads nowhere."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        if file.is_symlink():
            raise CheckpointError(f"{file} is a link to nothing; download the file again") from None
        return False
    except (OSError, ValueError) as error:  # a loop of links; a name with a null character
        raise CheckpointError(f"{str(file)!r} cannot be opened: {error}") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        raise CheckpointError(f"{file} is {kinds.get(stat.S_IFMT(mode), 'a device')}; a regular file is needed there")
    return True


def read_text(file: Path, most: int = MOST_TEXT) -> str:
    """The UTF-8 text of a regular file that is there."""
    if not is_there(file):
        raise FileNotFoundError(f"{file} is not there")
    if file.stat().st_size > most:
        raise CheckpointError(f"{file} has {file.stat().st_size} bytes; at most {most} are read of a file of this kind")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from error


def read_json(file: Path, schema: Mapping[str, Rule] | None = None) -> dict[str, Any]:
    """The JSON object in a file, whose values follow the schema; {} where there is no file."""
    if not is_there(file):
        return {}
    try:
        value = json.loads(read_text(file))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{file} is not valid JSON: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    check(value, schema or {}, file)
    return value


@contextmanager
def library_errors(sentence: str, cure: str = "") -> Iterator[None]:
    """Around a call of a library that reads a file from outside: whatever it raises becomes a CheckpointError, "sentence (reason)cure".

    Libraries in Rust report a panic as a PanicException, which is no Exception and would pass through every `except Exception`.
    """
    try:
        yield
    except (CheckpointError, ImportError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = "" if isinstance(error, MemoryError) else str(error).partition("\n")[0][:300]
        raise CheckpointError(f"{sentence} ({reason or type(error).__name__}){cure}") from error
