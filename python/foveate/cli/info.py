"""foveate info: what is compiled in, and what this machine can run."""

from __future__ import annotations

import argparse
from typing import Any

import foveate
from foveate.cli.options import print_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("info", help="what is compiled in, and what this machine can run")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    info = foveate.info()
    if args.json:
        print_json(info, indent=1)
    else:
        print(info)
