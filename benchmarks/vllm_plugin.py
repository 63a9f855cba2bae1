"""vLLM on a CPU with its own attention and with foveate's plug-in, by turns, each in a process of its own.

    bash .ci/vllm.sh .venv/bin/python --install && build/vllm/bin/python benchmarks/vllm_plugin.py --rounds 3

Without --model, a model of SmolLM2-135M's shapes with random weights. Prints one JSON object: seconds of each round to read the prompts
(one token each) and to write --tokens for all of them, and the ratios vLLM's / foveate's of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("vllm", "foveate")
METADATA = "Metadata-Version: 2.1\nName: foveate-plugin\nVersion: 0\n"
ENTRY = "[vllm.general_plugins]\nfoveate = foveate.integrations.vllm:register\n"


def make_model(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    config = LlamaConfig(vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def environment(name: str, folder: Path) -> dict[str, str]:
    """With the entry point of the plug-in, whether or not this checkout's is installed; vLLM loads it for foveate only."""
    info = folder / "foveate_plugin-0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY)
    package = Path(__file__).parents[1] / "python"
    paths = [os.environ.get("PYTHONPATH", str(package)), str(folder)]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "VLLM_PLUGINS": name, "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip


def work(args: argparse.Namespace) -> dict[str, float]:
    """In a process of one of the two: the seconds of both parts, after the same once before."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model, dtype=args.dtype, enforce_eager=True, skip_tokenizer_init=True, max_model_len=args.prompt + args.tokens + 16,
        max_num_seqs=args.streams, enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 40_000, (args.streams, args.prompt), generator=generator).tolist()
    prompts: list[Any] = [{"prompt_token_ids": row} for row in ids]

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        llm.generate(
            prompts, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False), use_tqdm=False
        )
        return time.perf_counter() - began

    seconds(2)
    read = seconds(1)
    return {"read_s": read, "write_s": seconds(args.tokens) - read}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a Hugging Face folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1024, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(args)))
        return 0
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if args.model is None:
            make_model(folder / "model")
            args.model = str(folder / "model")
        given = [f"--{name}={getattr(args, name)}" for name in ("model", "dtype", "streams", "prompt", "tokens")]
        for _ in range(args.rounds):
            for name in NAMES:
                command = [sys.executable, "-W", "ignore", __file__, "--worker", *given]
                done = subprocess.run(
                    command, env=environment(name, folder), stdout=subprocess.PIPE, text=True, check=True
                )
                rows[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {rows[name][-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {part: statistics.median(row[part] for row in rows[name]) for part in ("read_s", "write_s")}
        for name in NAMES
    }
    ratios = {part: round(medians["vllm"][part] / medians["foveate"][part], 3) for part in ("read_s", "write_s")}
    print(
        json.dumps(
            {
                "streams": args.streams,
                "prompt": args.prompt,
                "tokens": args.tokens,
                "rounds": rows,
                "times_faster": ratios,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
