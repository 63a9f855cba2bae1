"""Options that commands share: the model, sampling, what is printed."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from foveate.quantization.names import QUANTISABLE

DEFAULT_MAX_TOKENS = 256
_EARLY: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
MODEL_KINDS = (  # what a model's path may be, in --help
    "a Hugging Face folder, a .gguf file or any part of a split one, the name of an installed package that holds one, or a folder with a "
    "LoRA adapter"
)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_HALF_A_PAIR = re.compile(r"[\ud800-\udfff]")


class UsageError(Exception):
    """Arguments that do not go together: exit status 2."""


def text(value: str) -> str:
    """The type of an argument that a model reads. Bytes that are no UTF-8 come from the system as halves of surrogate pairs."""
    if _HALF_A_PAIR.search(value):
        raise argparse.ArgumentTypeError("the text is not UTF-8; convert it, for instance with iconv -f latin1")
    return value


def read_text(file: Path | None = None) -> str:
    """Text of a file, or of the standard input: UTF-8, with or without the mark that some editors write first. Line ends are newlines."""
    name = "the standard input" if file is None else str(file)
    try:
        if file is not None:
            data: Any = file.read_bytes()
        else:
            data = sys.stdin.buffer.read() if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        decoded = data if isinstance(data, str) else data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}; convert it, for instance with iconv") from None
    return decoded.replace("\r\n", "\n")


def read_documents(files: Sequence[Path]) -> list[str]:
    """Files that are each one text. UsageError for one that is not there: a newcomer gives the text itself."""
    if missing := next((file for file in files if not file.exists()), None):
        raise UsageError(
            f"there is no file {str(missing)!r}; DOCUMENTs are files, and a text itself is given with --text"
        )
    return [read_text(file) for file in files]


def input_lines() -> Iterator[str]:
    """Those of the standard input as they come, read as `read_text` reads."""
    for number, line in enumerate(getattr(sys.stdin, "buffer", sys.stdin), 1):
        try:
            text = line if isinstance(line, str) else line.removeprefix(codecs.BOM_UTF8).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"line {number} of the standard input is not UTF-8 text: {error}; convert it, for instance with iconv"
            ) from None
        yield text.removesuffix("\n").removesuffix("\r")


def print_json(value: Any, **form: Any) -> None:
    """One object, with escapes where the output has no UTF-8."""
    unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not unicode, **form))


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Says in a terminal, on stderr, what is awaited, and wipes it out afterwards."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"\r\033[Kloading {name} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def add_encoder_option(parser: argparse.ArgumentParser) -> None:
    """--model of the commands that read texts with an encoder."""
    parser.add_argument(
        "--model", required=True, metavar="PATH",
        help="a Hugging Face folder, the name of an installed package that holds one, or a folder with a LoRA adapter",
    )  # fmt: skip
    add_base_option(parser)


def add_base_option(group: Any) -> None:
    group.add_argument(
        "--base", metavar="PATH", help="the model that an adapter is for; by default the one that it names"
    )


def add_text_options(parser: argparse.ArgumentParser, what: str = "a text") -> None:
    """What `lines_or_texts` reads."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", action="append", type=text, metavar="TEXT", help="may be given several times")
    source.add_argument(
        "--file", type=Path, metavar="FILE", help=f"{what} in each line, in UTF-8; an empty line stays one"
    )


def lines_or_texts(args: argparse.Namespace) -> list[str]:
    """The texts of --text, the lines of --file, or those of the standard input, at least one of which is not empty."""
    if args.text is not None:
        return args.text
    if args.file is None and sys.stdin.isatty():
        raise UsageError("there is no text; give --text or --file, or pipe lines into the command")
    texts = read_text(args.file).removesuffix("\n").split("\n")  # splitlines also cuts at U+2028 and form feeds
    if not any(line.strip() for line in texts):
        raise UsageError("there is no text: all lines are empty")
    return texts


def encoder(kind: Any, args: argparse.Namespace) -> Any:
    """kind(args.model), of the commands that read texts with an encoder."""
    with loading(args.model):
        if args.base is None:
            return kind(args.model)
        from foveate.models import open_checkpoint

        return kind(open_checkpoint(args.model, args.base))


def add_model_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """several: --model may be given more than once, as NAME=PATH."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", required=True, metavar="PATH", action="append" if several else "store",
        help=MODEL_KINDS + ("; NAME=PATH names it for requests; may be given several times" if several else ""),
    )  # fmt: skip
    if not several:
        add_base_option(group)
        group.add_argument(
            "--adapter", metavar="PATH", help="a folder with a LoRA adapter of --model in peft's format, merged into it"
        )
    group.add_argument("--device", metavar="NAME", help="cpu (the default), cuda, ...")
    group.add_argument("--dtype", choices=sorted(DTYPES), help="of the weights; the checkpoint's by default")
    group.add_argument(
        "--quantization", choices=(*QUANTISABLE, "none"),
        help="pack the linear layers in 4 to 8 bits; none expands packed ones; by default they stay as they are stored",
    )  # fmt: skip
    group.add_argument(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="a text that the model reads first, so that formats with a search keep what matters",
    )
    group.add_argument("--kv-cache-dtype", choices=("int8", "fp8"), help="store keys and values in a byte each")
    group.add_argument("--max-model-len", type=int, metavar="N", help="tokens of prompt and output together")
    group.add_argument("--num-pages", type=int, metavar="N", help="size of the cache, in pages of 16 tokens")
    group.add_argument("--max-batch", type=int, default=64, metavar="N", help="sequences at once; 64 by default")
    group.add_argument(
        "--max-prefill-tokens", type=int, default=512, metavar="N", help="prompt tokens in one step; 512 by default"
    )
    group.add_argument("--no-prefix-caching", action="store_true", help="do not share equal beginnings of prompts")
    group.add_argument(
        "--draft-model", metavar="PATH",
        help="a smaller model with the same tokens that guesses ahead: changes the speed, never the text",
    )  # fmt: skip
    group.add_argument("--draft-tokens", type=int, default=4, metavar="N", help="its guesses in a step; 4 by default")
    group.add_argument(
        "--draft-quantization", choices=(*QUANTISABLE, "none"), help="of the draft model; that of --model by default"
    )
    group.add_argument("--threads", type=int, metavar="N", help="as torch.set_num_threads")


def add_sampling_options(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """several: also what asks for more than one sample."""
    group = parser.add_argument_group(
        "sampling",
        "Names and meanings are SamplingParams'; the checkpoint's own defaults apply where one is not given.",
    )

    def add(name: str, kind: Any, text: str, **options: Any) -> None:
        group.add_argument(name, type=kind, help=text, **({"metavar": "X" if kind is float else "N"} | options))

    add(
        "--max-tokens",
        int,
        f"at most so many new tokens; by default the checkpoint's max_new_tokens, or {DEFAULT_MAX_TOKENS}",
    )
    add("--temperature", float, "0 always takes the most probable token")
    add("--top-p", float, "only the most probable tokens that together reach this probability")
    add("--top-k", int, "only the N most probable tokens; 0 is all")
    add("--min-p", float, "only tokens with this share of the highest probability")
    add("--seed", int, "makes the output reproducible")
    add("--repetition-penalty", float, "above 1: tokens that were there become less probable")
    add("--presence-penalty", float, "subtracted once from the logits of tokens in the output")
    add("--frequency-penalty", float, "subtracted as often as they are there")
    add("--min-tokens", int, "no end before")
    add("--stop", str, "a text that ends the output; may be given several times", action="append", metavar="TEXT")
    add(
        "--stop-token-id",
        int,
        "a token that ends it; may be given several times",
        action="append",
        dest="stop_token_ids",
    )
    add(
        "--bad-word",
        str,
        "a text that must not come; may be given several times",
        action="append",
        metavar="TEXT",
        dest="bad_words",
    )
    add(
        "--logit-bias",
        _bias,
        "added to the logit of a token id; may be given several times",
        action="append",
        metavar="ID=X",
    )
    add(
        "--json-schema", _schema, "the output is JSON of this schema: a file, or the schema itself", metavar="FILE|JSON"
    )
    add("--regex", str, "the output matches this expression", metavar="RE")
    add("--prompt-lookup", int, "guess N tokens at a time from repetitions: changes the speed, never the text")
    for flag, text in (
        ("--ignore-eos", "go on after the model's end token"),
        ("--include-stop-str-in-output", "keep the stop text"),
    ):
        group.add_argument(flag, action="store_true", default=None, help=text)
    if several:
        add("--n", int, "samples for each prompt")
        add("--best-of", int, "of so many samples, print the n most probable")
        add("--num-beams", int, "beam search with so many beams")
        add("--length-penalty", float, "of beam search: above 0 favours long outputs")
        add("--early-stopping", _early, "of beam search: true, false or never", metavar="WHEN")
        add("--logprobs", int, "with --json: log-probabilities, also of the N most probable tokens")
        add("--prompt-logprobs", int, "the same for the prompt")


_SAMPLING = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens", "stop", "stop_token_ids", "bad_words", "logit_bias", "json_schema", "regex", "prompt_lookup", "ignore_eos",
    "include_stop_str_in_output", "n", "best_of", "num_beams", "length_penalty", "early_stopping", "logprobs", "prompt_logprobs",
)  # fmt: skip


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of SamplingParams that were given; UsageError for what they refuse."""
    import foveate

    given = {name: value for name in _SAMPLING if (value := getattr(args, name, None)) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    try:
        foveate.SamplingParams(**({"max_tokens": _most(given)} | given))
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    return given


def _most(given: dict[str, Any]) -> int:
    return max(DEFAULT_MAX_TOKENS, given.get("min_tokens", 0))


def params(llm: Any, given: dict[str, Any]) -> Any:
    """The checkpoint's own settings with those of `sampling` in their place."""
    if not llm.generation_config.get("max_new_tokens"):
        given = {"max_tokens": _most(given)} | given
    return llm.default_params.with_(**given)


def load(args: argparse.Namespace) -> Any:
    """The LLM."""
    arguments = llm_options(args)
    with loading(args.model):
        from foveate.generation.llm import LLM
    return LLM(args.model, base=args.base, adapter=args.adapter, **arguments)


def llm_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the model options say to LLM, but for the model itself; sets torch's threads."""
    import torch

    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads {args.threads} must be 1 or more")
        torch.set_num_threads(args.threads)
    return {
        "device": args.device, "dtype": None if args.dtype is None else getattr(torch, DTYPES[args.dtype]),
        "quantization": args.quantization, "imatrix": args.imatrix, "progress": sys.stderr.isatty(), "kv_cache_dtype": args.kv_cache_dtype,
        "max_model_len": args.max_model_len, "num_pages": args.num_pages, "max_batch": args.max_batch,
        "max_prefill_tokens": args.max_prefill_tokens, "enable_prefix_caching": not args.no_prefix_caching,
        "draft_model": args.draft_model, "draft_tokens": args.draft_tokens,
        "draft_quantization": args.draft_quantization,
    }  # fmt: skip


def rates(llm: Any) -> dict[str, Any]:
    """What --stats prints."""
    stats = llm.stats
    return {
        "runs_on": llm.runs_on,
        "prefill_tokens": stats.prefill_tokens,
        "prefill_tokens_per_second": _rate(stats.prefill_tokens, stats.prefill_time),
        "cached_tokens": stats.cached_tokens,
        "decode_tokens": stats.decode_tokens,
        "decode_tokens_per_second": _rate(stats.decode_tokens, stats.decode_time),
        "drafted_tokens": stats.drafted_tokens,
        "accepted_tokens": stats.accepted_tokens,
    }


def print_rates(llm: Any) -> None:
    measured = rates(llm)
    lines = [
        f"runs on   {measured['runs_on']}",
        f"prefill   {measured['prefill_tokens']} tokens, {measured['prefill_tokens_per_second'] or 0:.1f} tokens/s"
        + (f", {measured['cached_tokens']} more from the prefix cache" if measured["cached_tokens"] else ""),
        f"decode    {measured['decode_tokens']} tokens, {measured['decode_tokens_per_second'] or 0:.1f} tokens/s",
    ]
    if measured["drafted_tokens"]:
        lines.append(f"drafts    {measured['accepted_tokens']} of {measured['drafted_tokens']} tokens were right")
    print("\n".join(lines), file=sys.stderr)


def print_pieces(pieces: Any) -> str:
    """Prints text as it comes; the whole."""
    parts = []
    for piece in pieces:
        print(piece, end="", flush=True)
        parts.append(piece)
    print()
    return "".join(parts)


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if seconds > 0 else None


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be ID=NUMBER, e.g. 42=-100") from None


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{text} cannot be read ({error.strerror}); give a file, or the schema itself"
        ) from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not valid JSON: {error}") from None
    if not isinstance(schema, dict):
        raise argparse.ArgumentTypeError(f"{text} must hold a JSON object")
    return schema


def _early(text: str) -> bool | str:
    try:
        return _EARLY[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} must be true, false or never") from None
