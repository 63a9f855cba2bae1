"""Random damage from a seed: python fuzz.py KIND FIRST COUNT. Each case ends in success or in one of foveate's own sentences.

The process has limits: 3 GB more than at the start, 30 s for a case. It writes the number of each case before it begins, so that
whoever started it knows which one ended it.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fuzz_kinds
from foveate import LLM, SamplingParams
from foveate.models import load_model, open_checkpoint
from hostile import CONFIG, gguf_file, llama_folder, put

VALUES: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64 - 1, 10**30, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), "", "x", "../x", "\0",
    "\ud800", [], [1], ["a"], [[]], {}, {"rope_type": "linear"}, {"a": {"b": []}}, "llama", "gpt2", "bert", "t5", "silu",
]  # fmt: skip


def damaged(value: Any, draw: random.Random) -> Any:
    """JSON with one place changed, removed or added."""
    value = copy.deepcopy(value)
    place = value
    while isinstance(place, (dict, list)) and place:
        key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.7:
            place = place[key]
            continue
        if draw.random() < 0.2:
            del place[key]
        else:
            place[key] = draw.choice(VALUES)
        break
    return value


def flipped(data: bytes, draw: random.Random, within: int) -> bytes:
    """Some bytes of the first `within` changed, cut out or repeated."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(min(within, len(found)) or 1)
        kind = draw.random()
        if kind < 0.7:
            found[at : at + 1] = bytes([draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))])
        elif kind < 0.85:
            del found[at : at + draw.randrange(1, 20)]
        else:
            found[at:at] = found[at : at + draw.randrange(1, 20)]
    return bytes(found)[: draw.choice((len(found), len(found), draw.randrange(len(found) + 1)))]


def run(path: Path) -> None:
    llm = LLM(path, kv_cache_bytes=1 << 18, progress=False)
    llm.generate([[5]], SamplingParams(max_tokens=1, temperature=0))
    if llm.tokenizer is not None:
        llm.tokenizer.encode('A!" b')


def folders(draw: random.Random, folder: Path) -> None:
    name = draw.choice(["config.json"] * 3 + ["generation_config.json", "tokenizer_config.json"])
    value = json.loads((folder / name).read_text())
    for _ in range(draw.choice((1, 1, 2))):
        value = damaged(value, draw)
    put(folder / name, json.dumps(value))
    run(folder)


def ggufs(draw: random.Random, folder: Path) -> None:
    def change(fields: dict[str, Any], tensors: Any) -> None:
        key = draw.choice(list(fields))
        value = draw.choice(
            [v for v in VALUES if not isinstance(v, (dict, float)) and v not in (None, 10**30, [[]], "\ud800")]
        )
        fields[key] = value

    file = gguf_file(folder / "m.gguf", change if draw.random() < 0.5 else None)
    if draw.random() < 0.6:
        file.write_bytes(flipped(file.read_bytes(), draw, 3000))
    run(file)


def weights(draw: random.Random, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(flipped(file.read_bytes(), draw, 2500))
    run(folder)


def tokenizers(draw: random.Random, folder: Path) -> None:
    file = folder / "tokenizer.json"
    if draw.random() < 0.7:
        put(file, json.dumps(damaged(json.loads(file.read_text()), draw)))
    else:
        file.write_bytes(flipped(file.read_bytes(), draw, 10**6))
    tokenizer = open_checkpoint(folder).tokenizer()
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode('A!" b'))


def adapters(draw: random.Random, folder: Path) -> None:
    from foveate.train.checkpoints.adapter import load_adapter, save_adapter
    from foveate.train.modules.lora import LoraConfig, add_lora

    model = load_model(folder, progress=False)
    add_lora(model, LoraConfig(2))
    save_adapter(model, LoraConfig(2), folder, base=None)
    if draw.random() < 0.6:
        file = folder / "adapter_config.json"
        put(file, json.dumps(damaged(json.loads(file.read_text()), draw)))
    else:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(flipped(file.read_bytes(), draw, 2500))
    load_adapter(load_model(folder, progress=False), folder)


def states(draw: random.Random, folder: Path) -> None:
    from foveate.train.checkpoints import sharded
    from foveate.train.strategy import Strategy

    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    state = folder / "state"
    state.mkdir()
    if draw.random() < 0.5:
        Strategy().save_state(state, model, optimizer, {"step": 1})
    else:
        sharded.save(state, model, optimizer, {"step": 1})
    file = draw.choice(sorted(state.iterdir()))
    file.write_bytes(flipped(file.read_bytes(), draw, 1500))
    Strategy().load_state(state, model, optimizer)


def requests(draw: random.Random, folder: Path) -> None:
    llm = LLM(folder, kv_cache_bytes=1 << 18, progress=False)
    names = list(SamplingParams.__dataclass_fields__)
    options = {
        name: draw.choice([*VALUES, 0.7, 2, ["!"], {5: 1.0}]) for name in draw.sample(names, draw.choice((1, 1, 2, 3)))
    }
    prompt = draw.choice([[5], [5, 6] * 9, [], [-1], [10**9], "A", "", "\ud800", None, [[5]], [True], {"a": 1}])
    llm.generate([prompt], SamplingParams(**{"max_tokens": 3, **options}))


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "folders": folders, "ggufs": ggufs, "weights": weights, "tokenizers": tokenizers, "adapters": adapters, "states": states,
    "requests": requests,
    **{name: functools.partial(kind, damaged=damaged, flipped=flipped) for name, kind in fuzz_kinds.KINDS.items()},
}  # fmt: skip


def ours(error: BaseException) -> bool:
    """Whether a `raise` of foveate made it, so that its words are a sentence of ours."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    own = "foveate" in Path(frame.filename).parts and (frame.line or "").lstrip().startswith("raise")
    return own and isinstance(error, (ValueError, OSError, TypeError, IndexError, NotImplementedError))


def main(kind: str, first: int, count: int) -> int:
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what Rust prints of a panic
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), resource.RLIM_INFINITY))
    wrong = 0
    with tempfile.TemporaryDirectory() as root:
        whole = llama_folder(
            Path(root) / "whole", **({} if kind != "requests" else {"max_position_embeddings": CONFIG["vocab_size"]})
        )
        for seed in range(first, first + count):
            print(f"case {kind} {seed}", flush=True)
            signal.alarm(30)
            folder = Path(root) / "case"
            shutil.copytree(whole, folder)
            try:
                KINDS[kind](random.Random(seed), folder)
            except BaseException as error:
                if not ours(error):
                    wrong += 1
                    at = traceback.extract_tb(error.__traceback__)[-1]
                    print(
                        f"WRONG {kind} {seed}: {type(error).__name__}: {str(error)[:200]!r} at {at.filename}:{at.lineno}",
                        flush=True,
                    )
            shutil.rmtree(folder)
    return min(wrong, 100)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
