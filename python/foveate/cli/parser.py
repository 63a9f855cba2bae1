"""The parser of the commands: two lines for a wrong flag, with the one that is meant, and help as wide as the terminal."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from foveate.cli import config_file

WIDEST = 100  # columns of help; longer lines are hard to read
# What other programs call our options.
_OTHERS = {
    "lr": "learning-rate", "num-train-epochs": "epochs", "num-epochs": "epochs", "per-device-train-batch-size": "batch-size",
    "train-batch-size": "batch-size", "micro-batch-size": "batch-size", "gradient-accumulation-steps": "accumulation",
    "grad-accum": "accumulation", "lora-r": "lora-rank", "r": "lora-rank", "lora-target-modules": "lora-targets",
    "target-modules": "lora-targets", "bf16": "precision", "fp16": "precision", "mixed-precision": "precision",
    "report-to": "tensorboard", "max-seq-length": "max-length", "max-seq-len": "max-length", "cutoff-len": "max-length",
    "block-size": "max-length", "dataset": "train-data", "data": "train-data", "train-file": "train-data",
    "validation-file": "eval-data", "valid-data": "eval-data", "val-data": "eval-data", "output": "output-dir", "out": "output-dir",
    "model-name-or-path": "model", "model-name": "model", "base-model": "model", "lr-scheduler-type": "schedule", "scheduler": "schedule",
    "lr-scheduler": "schedule", "warmup-steps": "warmup", "warmup-ratio": "warmup", "eval-steps": "eval-every", "save-steps": "save-every",
    "logging-steps": "log-every", "eval-ratio": "eval-fraction", "val-split": "eval-fraction", "resume-from-checkpoint": "resume",
    "load-in-4bit": "quantization", "load-in-8bit": "quantization", "quantize": "quantization", "adam-beta1": "beta1",
    "adam-beta2": "beta2", "adam-epsilon": "adam-eps", "max-new-tokens": "max-tokens", "n-predict": "max-tokens",
    "num-predict": "max-tokens",
    "temp": "temperature", "repeat-penalty": "repetition-penalty", "num-return-sequences": "n", "ctx-size": "max-model-len",
    "max-context": "max-model-len", "context-length": "max-model-len", "kv-cache-type": "kv-cache-dtype", "system-prompt": "system",
    "stop-strings": "stop", "num-threads": "threads", "n-threads": "threads", "batch": "max-batch",
    "dtypes": "dtype", "torch-dtype": "dtype",
    "text-column": "text-field", "label-column": "label-field", "input-file": "file", "context-path": "context-file", "topk": "top-k",
    "topp": "top-p", "output-format": "json", "format": "json",
}  # fmt: skip


class CommandParser(argparse.ArgumentParser):
    """Flags are also taken with underscores for their hyphens."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **({"formatter_class": HelpFormatter} | options))

    def format_help(self) -> str:
        if self.usage is None:  # of all options it would be sixty lines
            required = [
                f"{a.option_strings[0]} {a.metavar or 'X'}" for a in self._actions if a.required and a.option_strings
            ]
            positional = ["COMMAND"] if self._subparsers is not None else []
            positional += [
                f"{a.metavar} [{a.metavar} ...]" for a in self._get_positional_actions() if self._subparsers is None
            ]
            usage = " ".join([self.prog, *positional, *required, "[options]"])
            width = HelpFormatter(self.prog).width - len("usage: ")
            self.usage = "\n".join(textwrap.wrap(usage, width, subsequent_indent=" " * 11)).replace("%", "%%")
        return super().format_help()

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        if self._subparsers is not None or args is None:
            return super().parse_known_args(args, namespace)
        found, rest = super().parse_known_args(self._checked(list(args)), namespace)
        if rest:
            self._stop(f"{' '.join(map(repr, rest))}: the command takes no more arguments without an option", "")
        return found, rest

    def _checked(self, args: list[str]) -> list[str]:
        """Each flag as it is spelt here, after those of a --config; one that is unknown ends the program before what it may have left
        out does."""
        known = self._option_string_actions
        if "--config" in known:
            try:
                args = config_file.arguments(args, known, self._meant) + args
            except ValueError as error:
                self._stop(str(error), "")
        for i, arg in enumerate(args):
            if arg == "--":
                break
            if self._is_short(arg):
                self._stop(f"{arg} is not an option", self._meant(f"-{arg}".replace("_", "-")))
            if not arg.startswith("--") or " " in arg.partition("=")[0]:
                continue
            flag, equals, value = arg.partition("=")
            flag = flag.replace("_", "-")
            if flag in known or any(name.startswith(flag) for name in known):
                args[i] = flag + equals + value
            else:
                self._stop(f"{arg.partition('=')[0]} is not an option", self._meant(flag))
        return args

    def _is_short(self, arg: str) -> bool:
        """An option with one hyphen that there is not, such as -model; no number, and not "-", the standard input."""
        known = self._option_string_actions
        return re.fullmatch(r"-[A-Za-z_][\w-]*", arg) is not None and arg not in known and arg[:2] not in known

    def _meant(self, flag: str) -> str:
        """The question that names the option which is likely meant."""
        known = [name for name in self._option_string_actions if name.startswith("--") and name != "--help"]
        other = f"--{_OTHERS.get(flag[2:], '')}"
        if other in known:
            return f"did you mean {other}?"
        squeezed = {name.replace("-", ""): name for name in known}
        close = difflib.get_close_matches(flag.replace("-", ""), squeezed, n=1, cutoff=0.6)
        return f"did you mean {squeezed[close[0]]}?" if close else "no option is similar;"

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"argument COMMAND: invalid choice: '([^']*)' \(choose from (.*)\)", message):
            names = re.findall(r"[\w-]+", match[2])
            close = difflib.get_close_matches(match[1], names, n=1)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)};"
            self._stop(f"{match[1]!r} is not a command", meant)
        self._stop(message, "")

    def _stop(self, message: str, cure: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n{cure}{' ' if cure else ''}{self.prog} --help explains all\n")


class HelpFormatter(argparse.HelpFormatter):
    """Texts are laid out anew for the width of the terminal, 80 columns where there is none; see `lay_out`."""

    def __init__(self, prog: str, **options: Any) -> None:
        self.width = max(40, min(WIDEST, shutil.get_terminal_size().columns))
        super().__init__(prog, **({"width": self.width, "max_help_position": min(28, self.width // 3)} | options))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(lay_out(text, self._width - len(indent)), indent)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "X"

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        """Long lists of choices stand in the help text, where they can be wrapped."""
        if action.metavar is None and action.choices is not None and len(",".join(map(str, action.choices))) > 20:
            return lambda size: ("NAME",) * size
        return super()._metavar_formatter(action, default_metavar)

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        if action.metavar is None and action.choices is not None and action.option_strings:
            choices = list(map(str, action.choices))
            if len(",".join(choices)) > 20:
                text += f": {', '.join(choices)}"
        return text


def lay_out(text: str, width: int) -> str:
    """Paragraphs filled to `width`; an indented line by itself, with what is indented more joined to it: shell commands break with a
    backslash where a space is not quoted, other lines hang below what follows two spaces."""
    out: list[str] = []
    for kind, line in _blocks(text):
        if kind == "text":
            out += textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) or [""]
        elif re.match(r"  (foveate|printf|echo|torchrun|pip) ", line):
            out += _command(line.strip(), width)
        else:
            term = re.match(r"  \S+(?: \S+)*?(?:\s{2,}|$)", line)
            hang = len(term[0]) if term and len(term[0]) < width // 2 and len(term[0]) < len(line) else 6
            out += textwrap.wrap(
                line,
                width,
                subsequent_indent=" " * hang,
                drop_whitespace=True,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(out)


def _blocks(text: str) -> list[tuple[str, str]]:
    blocks: list[tuple[str, str]] = []
    for line in text.rstrip("\n").split("\n"):
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            blocks.append(("text", ""))
        elif indent > 2 and blocks and blocks[-1][0] == "line":
            blocks[-1] = ("line", f"{blocks[-1][1].removesuffix(chr(92)).rstrip()} {line.strip()}")
        elif indent:
            blocks.append(("line", line))
        elif blocks and blocks[-1][0] == "text" and blocks[-1][1] and not blocks[-1][1].endswith(":"):
            blocks[-1] = ("text", f"{blocks[-1][1]} {line}")
        else:
            blocks.append(("text", line))
    return blocks


def _command(line: str, width: int) -> list[str]:
    """Broken at spaces outside of quotes, an option and its value together where that fits."""
    words = re.findall(r"(?:\$?'[^']*'|\"[^\"]*\"|[^\s'\"])+", line)
    pieces: list[str] = []
    for word in words:
        joins = (
            pieces
            and pieces[-1].startswith("--")
            and not word.startswith("-")
            and len(pieces[-1]) + len(word) < width - 10
        )
        if joins:
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines, now = [], "  "
    for piece in pieces:
        if len(now) + len(piece) + 2 > width and now.strip():
            lines.append(f"{now.rstrip()} \\")
            now = "      "
        now += f"{piece} "
    items = [*lines, now.rstrip()]
    return [part for item in items for part in _quoted(item, width)]


def _quoted(line: str, width: int) -> list[str]:
    """JSON between quotes may be broken at its spaces."""
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent="          ", break_long_words=False, break_on_hyphens=False)
