"""--config FILE: the options of a command in a YAML, TOML or JSON file, as the arguments that say the same."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_KINDS = ".yaml, .yml, .toml or .json"


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="options in YAML, TOML or JSON, by their names: learning_rate: 1e-4; those of the command line stand in their place",
    )  # fmt: skip


def arguments(args: Sequence[str], actions: Mapping[str, argparse.Action], meant: Callable[[str], str]) -> list[str]:
    """["--learning-rate=1e-4", "--train-data", "a.jsonl", "--no-packing", ...] for the keys of the file that a --config in args names:
    the options of the command, with underscores or hyphens. null leaves an option at its default.

    actions: those of the parser, by flag. meant: the question that names the option that an unknown flag is likely to mean. ValueError
    for a file that cannot be read, for unknown keys, and for values that an option cannot have.
    """
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--config", action="append", default=[])
    files = flags.parse_known_args(list(args))[0].config
    return [argument for file in files for argument in _options(Path(file), actions, meant)]


def _options(file: Path, actions: Mapping[str, argparse.Action], meant: Callable[[str], str]) -> list[str]:
    arguments: list[str] = []
    for key, value in _read(file).items():
        flag = f"--{str(key).replace('_', '-')}"
        action = actions.get(flag)
        if action is None or flag in ("--config", "--help") or flag != action.option_strings[0]:
            raise ValueError(
                f"{file}: {key} is not an option that a file can set; {meant(flag).replace('--', '').replace('-', '_')}"
            )
        if value is not None:
            arguments += _argument(f"{file}: {key}", action, value)
    return arguments


def _argument(name: str, action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0]
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; it must be true or false")
        off = action.option_strings[1:]
        return [flag] if value else list(off[:1])
    if isinstance(value, dict):
        if action.metavar == "FILE|JSON":
            return [f"{flag}={json.dumps(value)}"]
        if action.metavar == "FIELD=RANGE":
            return [f"{flag}={field}={_range(tried)}" for field, tried in value.items()]
    elif isinstance(value, list):
        repeated = isinstance(action, argparse._AppendAction)
        if value and (repeated or action.nargs == "+") and not any(isinstance(part, (dict, list)) for part in value):
            return [f"{flag}={part}" for part in value] if repeated else [flag, *map(str, value)]
    elif action.nargs == "+":
        return [flag, str(value)]
    else:
        return [f"{flag}={value}"]
    raise ValueError(f"{name} is {value!s:.80}, a {type(value).__name__}, which this option cannot be")


def _range(tried: Any) -> str:
    return ",".join(map(str, tried)) if isinstance(tried, list) else str(tried)


def _read(file: Path) -> dict[Any, Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} cannot be read: {error}") from None
    kind = file.suffix.lower()
    try:
        if kind == ".json":
            options = json.loads(text)
        elif kind == ".toml":
            options = _toml(file)(text)
        elif kind in (".yaml", ".yml"):
            options = _yaml(file)(text)
        else:
            raise ValueError(f"the name must end in {_KINDS}")
    except ImportError:
        raise
    except Exception as error:  # PyYAML's errors have no base that others share
        raise ValueError(
            f"--config {file} cannot be read as {kind.lstrip('.').upper() or 'a configuration'}: {error}"
        ) from None
    if not isinstance(options, dict):
        raise ValueError(f"{file} must hold options and their values, and holds a {type(options).__name__}")
    return options


def _toml(file: Path) -> Callable[[str], Any]:
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise ImportError(f"{file} needs Python 3.11 or later to be read; write it in YAML or JSON") from error
    return tomllib.loads


def _yaml(file: Path) -> Callable[[str], Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(
            f"{file} needs PyYAML (pip install pyyaml) to be read; or write it in TOML or JSON"
        ) from error
    return yaml.safe_load
