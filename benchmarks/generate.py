"""Tokens per second of one model in foveate, llama.cpp and transformers: decoding alone, 16 at once, a prompt of 512 tokens.

    python benchmarks/generate.py --model FILE.gguf --out benchmarks/results [--llama FOLDER] [--threads 2] [--rounds 9]

llama.cpp runs the same GGUF file through llama-cpp-python (flash attention on); --llama names the folder that it is installed in, if
that is not on the path. transformers runs the same weights expanded to fp32 and bf16. --model random-gpt2 is GPT-2's shape (124M) with
random weights; --quantization packs a model that is not packed yet. Each engine has a process of its own, so that their OpenMP runtimes
do not meet, and the processes take turns: in every round each runs every case once. A result is the median. Greedy decoding of random
tokens; the choice of the next token is included, tokenisation is not.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

PROMPT, LONG_PROMPT, NEW, MANY = 32, 512, 48, 16
CASES = {
    "decode": f"1 request, {NEW} tokens after {PROMPT}",
    "decode_16": f"{MANY} requests at once, {NEW // 2} tokens each after {PROMPT}",
    "prefill": f"prompt of {LONG_PROMPT} tokens",
}
ENGINES = ("foveate", "llama.cpp", "transformers fp32", "transformers bf16")


def tokens(rows: int, columns: int, vocab: int) -> list[list[int]]:
    import random

    generator = random.Random(0)
    return [[generator.randrange(vocab) for _ in range(columns)] for _ in range(rows)]


def timed(prepare: Callable[[], Any], run: Callable[[Any], None], count: int) -> float:
    """Tokens per second of run(prepare()), which is about `count` tokens."""
    state = prepare()
    start = time.perf_counter()
    run(state)
    return count / (time.perf_counter() - start)


# ---- engines: each returns {case: function that runs it once and returns tokens/s} and a few facts ------------------------------


def foveate_engine(
    model: str, threads: int, quantization: str | None
) -> tuple[dict[str, Callable[[], float]], dict[str, Any]]:
    import torch

    import foveate
    from foveate.backend import native
    from foveate.bench import roofline
    from foveate.models import load_model
    from foveate.models.native_decoder import NativeDecoder
    from foveate.nn import PackedLinear

    torch.set_num_threads(threads)
    module = load_model(model, quantization=quantization)
    decoder = NativeDecoder(module)  # packs every linear layer
    nbytes = sum(m.nbytes for m in module.modules() if isinstance(m, PackedLinear))
    c = decoder.config
    cache = foveate.PagedKVCache(
        128, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, num_layers=c.num_layers, dtype=torch.float32
    )

    def step(seqs: list[int], new: torch.Tensor) -> torch.Tensor:
        cache.append(seqs, new.shape[1])
        hidden = decoder.hidden(new, foveate.CacheView(cache, seqs, new.shape[1]))
        return decoder.logits(hidden[:, -1]).argmax(-1, keepdim=True)

    def fresh(rows: int, prompt: int) -> tuple[list[int], torch.Tensor]:
        for seq in list(cache._pages):
            cache.free(seq)
        return [cache.create() for _ in range(rows)], torch.tensor(tokens(rows, prompt, c.vocab_size))

    def prompted(rows: int) -> tuple[list[int], torch.Tensor]:
        seqs, prompt = fresh(rows, PROMPT)
        return seqs, step(seqs, prompt)

    def decode(state: tuple[list[int], torch.Tensor], count: int) -> None:
        seqs, new = state
        for _ in range(count):
            new = step(seqs, new)

    buffer, sums = torch.ones(2 * roofline.last_cache_bytes()), torch.zeros(threads)  # 8 times the last cache

    def read_rate() -> float:
        """GB/s, the best of several passes: a limit is a maximum."""
        return (
            max(
                timed(lambda: None, lambda _: native._C.read_memory(buffer, sums, threads), buffer.nbytes)
                for _ in range(7)
            )
            / 1e9
        )

    runs = {
        "decode": lambda: timed(lambda: prompted(1), lambda s: decode(s, NEW), NEW),
        "decode_16": lambda: timed(lambda: prompted(MANY), lambda s: decode(s, NEW // 2), MANY * NEW // 2),
        "prefill": lambda: timed(lambda: fresh(1, LONG_PROMPT), lambda s: step(*s), LONG_PROMPT),
        "read_gbs": read_rate,
    }
    return runs, {"weight_bytes": nbytes}


def llama_engine(model: str, threads: int) -> tuple[dict[str, Callable[[], float]], dict[str, Any]]:
    import llama_cpp as lib
    import numpy as np

    # The functions below llama-cpp-python's Llama class, which has one sequence only.
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 4096, LONG_PROMPT, LONG_PROMPT, MANY
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type, params.kv_unified = 1, True
    quiet = lib.llama_log_callback(lambda level, text, data: None)
    lib.llama_log_set(quiet, None)
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    context = lib.llama_init_from_model(loaded, params)
    memory = lib.llama_get_memory(context)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
    batch = lib.llama_batch_init(LONG_PROMPT, 0, 1)

    def step(new: list[list[int]], position: int) -> list[list[int]]:
        """new[sequence]: the tokens from `position` on; returns the next one of each."""
        batch.n_tokens, last = 0, []
        for sequence, row in enumerate(new):
            for i, token in enumerate(row):
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + i, 1
                batch.seq_id[at][0] = sequence
                batch.logits[at] = i == len(row) - 1
                batch.n_tokens += 1
            last.append(batch.n_tokens - 1)
        if lib.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [[int(np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (vocab,)).argmax())] for i in last]

    def prompted(rows: int) -> list[list[int]]:
        lib.llama_memory_clear(memory, True)
        return step(tokens(rows, PROMPT, vocab), 0)

    def clear() -> list[list[int]]:
        lib.llama_memory_clear(memory, True)
        return tokens(1, LONG_PROMPT, vocab)

    def decode(new: list[list[int]], count: int) -> None:
        for i in range(count):
            new = step(new, PROMPT + i)

    runs = {
        "decode": lambda: timed(lambda: prompted(1), lambda s: decode(s, NEW), NEW),
        "decode_16": lambda: timed(lambda: prompted(MANY), lambda s: decode(s, NEW // 2), MANY * NEW // 2),
        "prefill": lambda: timed(clear, lambda s: step(s, 0), LONG_PROMPT),
    }
    return runs, {"version": lib.__version__}


def transformers_engine(model: str, threads: int, dtype: str) -> tuple[dict[str, Callable[[], float]], dict[str, Any]]:
    import torch
    import transformers

    from foveate.models import load_model, open_checkpoint

    torch.set_num_threads(threads)
    if Path(model).is_dir():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="sdpa")
    else:
        checkpoint = open_checkpoint(model)
        config = transformers.AutoConfig.for_model(**checkpoint.config)
        theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        theirs.load_state_dict(load_model(checkpoint, quantization="none").state_dict(), strict=False)
    config, theirs = theirs.config, theirs.to(getattr(torch, dtype)).eval()

    def step(past: Any, new: torch.Tensor) -> tuple[Any, torch.Tensor]:
        with torch.inference_mode():
            out = theirs(input_ids=new, past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)

    def prompted(rows: int) -> tuple[Any, torch.Tensor]:
        return step(None, torch.tensor(tokens(rows, PROMPT, config.vocab_size)))

    def decode(state: tuple[Any, torch.Tensor], count: int) -> None:
        for _ in range(count):
            state = step(*state)

    def prompt() -> torch.Tensor:
        return torch.tensor(tokens(1, LONG_PROMPT, config.vocab_size))

    runs = {
        "decode": lambda: timed(lambda: prompted(1), lambda s: decode(s, NEW), NEW),
        "decode_16": lambda: timed(lambda: prompted(MANY), lambda s: decode(s, NEW // 2), MANY * NEW // 2),
        "prefill": lambda: timed(prompt, lambda s: step(None, s), LONG_PROMPT),
    }
    return runs, {"version": transformers.__version__}


def random_gpt2(folder: str) -> None:
    """GPT-2's shape, 124M weights, as a Hugging Face folder."""
    import transformers

    transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(folder)


def serve(engine: str, model: str, threads: int, quantization: str | None) -> None:
    """A worker: prints its facts, then for each case read from stdin the tokens/s of one run. What the engine prints goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    if engine == "foveate":
        runs, facts = foveate_engine(model, threads, quantization)
    elif engine == "llama.cpp":
        runs, facts = llama_engine(model, threads)
    else:
        runs, facts = transformers_engine(model, threads, "float32" if engine.endswith("fp32") else "bfloat16")
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(runs[line.strip()](), file=answers, flush=True)


# ---- the parent ------------------------------------------------------------------------------------------------------------------


class Worker:
    def __init__(self, engine: str, options: argparse.Namespace) -> None:
        command = [
            sys.executable,
            __file__,
            "--serve",
            engine,
            "--model",
            options.model,
            "--threads",
            str(options.threads),
        ]
        if options.llama:
            command += ["--llama", options.llama]
        if options.quantization:
            command += ["--quantization", options.quantization]
        self.engine = engine
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = json.loads(self._line())

    def _line(self) -> str:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"the process of {self.engine} ended with {self.process.wait()}; its words are above")
        return line

    def run(self, case: str) -> float:
        time.sleep(0.05)  # the threads of the process before stop spinning
        print(case, file=self.process.stdin, flush=True)
        return float(self._line())

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def measure(options: argparse.Namespace) -> tuple[dict[tuple[str, str], list[float]], list[float], dict[str, Any]]:
    workers = [Worker(engine, options) for engine in options.engines]
    results: dict[tuple[str, str], list[float]] = {(c, w.engine): [] for c in CASES for w in workers}
    read: list[float] = []
    for round in range(-1, options.rounds):  # the first is not counted
        for case in CASES:
            for worker in workers:
                rate = worker.run(case)
                if round >= 0:
                    results[case, worker.engine].append(rate)
        if round >= 0 and workers[0].engine == "foveate":
            read.append(workers[0].run("read_gbs"))
    for worker in workers:
        worker.close()
    return results, read, {worker.engine: worker.facts for worker in workers}


def table(
    results: dict[tuple[str, str], list[float]], read: list[float], facts: dict[str, Any], engines: list[str]
) -> str:
    """Markdown: tokens/s and, for the peers, how many times faster foveate is."""
    median = {key: statistics.median(rates) for key, rates in results.items()}
    lines = ["| tokens/s | " + " | ".join(engines) + " |", "|---|" + "---:|" * len(engines)]
    for case, words in CASES.items():
        cells = []
        for engine in engines:
            ratio = median[case, engines[0]] / median[case, engine]
            cells.append(f"{median[case, engine]:.0f}" + ("" if engine == engines[0] else f" ({ratio:.1f}x)"))
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    if read:
        used, limit = facts["foveate"]["weight_bytes"] * median["decode", "foveate"] / 1e9, statistics.median(read)
        lines += [
            "",
            f"Decoding alone, foveate reads {facts['foveate']['weight_bytes'] / 1e6:.0f} MB of weights a token at {used:.1f} GB/s, "
            f"{100 * used / limit:.0f} % of the {limit:.1f} GB/s measured in the same run; {MANY} requests at once make "
            f"{median['decode_16', 'foveate'] / median['decode', 'foveate']:.1f} times the tokens of one.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a .gguf file, a Hugging Face folder, or random-gpt2")
    parser.add_argument("--quantization", choices=("q8_0", "q4_0"), help="what foveate packs the weights in")
    parser.add_argument("--label", help="goes into the names of the files; the README shows those without one")
    parser.add_argument("--out", type=Path, help="folder for generate_MACHINE_DATE.csv and .md")
    parser.add_argument("--llama", help="folder that llama_cpp is installed in")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--engines", nargs="+", default=list(ENGINES), choices=ENGINES, help="foveate first, to compare with it"
    )
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.llama:
        sys.path.append(options.llama)
    if options.serve:
        return serve(options.serve, options.model, options.threads, options.quantization)

    name = Path(options.model).stem
    if not options.model.endswith(".gguf"):
        options.engines = [engine for engine in options.engines if engine != "llama.cpp"]
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "random-gpt2":
            random_gpt2(folder)
            options.model = folder
        results, read, facts = measure(options)
    import torch

    from foveate.bench import machine

    torch.set_num_threads(options.threads)
    where = machine.describe()
    packed = f" in {options.quantization}" if options.quantization else ""
    text = f"{name}{packed}; {where.line}\n\n" + table(results, read, facts, options.engines)
    print(text)
    if options.out is None:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / where.stem("generate", options.label or "")
    stem.with_suffix(".md").write_text(text)
    with stem.with_suffix(".csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow([*asdict(where), "case", "engine", "version", "tokens_per_s", "lowest", "highest", "rounds"])
        for (case, engine), rates in results.items():
            version = facts[engine].get("version", where.foveate)
            numbers = [round(x, 1) for x in (statistics.median(rates), min(rates), max(rates))]
            rows.writerow([*asdict(where).values(), case, engine, version, *numbers, len(rates)])


if __name__ == "__main__":
    main()
