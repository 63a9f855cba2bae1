"""Small models and data for the tests of training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from foveate.train import TrainConfig, fit
from foveate.train.fitting import TrainResult

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
WORDS = "the quick brown fox jumps over a lazy dog and runs far away from here to there while rain falls on old stones".split()


def sentences(count: int, seed: int = 0, longest: int = 9) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(2, longest))) for _ in range(count)]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts(folder: Path, count: int = 40, seed: int = 0, name: str = "texts.jsonl") -> str:
    return write_jsonl(folder / name, [{"text": text} for text in sentences(count, seed)])


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """Of a short run of a small Llama on characters, its output in folder/out."""
    base: dict[str, Any] = {
        "new_model": LLAMA, "tokenizer": "char", "output_dir": str(folder / "out"), "cache_dir": str(folder / "cache"),
        "max_steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "progress": False,
    }  # fmt: skip
    if "train_data" not in changes:
        base["train_data"] = [texts(folder)]
    return base | changes


def run(folder: Path, **changes: Any) -> TrainResult:
    return fit(TrainConfig(**options(folder, **changes)))


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in result.model.named_parameters()}


def largest_difference(a: TrainResult, b: TrainResult) -> float:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    return max(float((x[name] - y[name]).abs().max()) for name in x)


def losses(result: TrainResult, name: str = "loss") -> list[float]:
    return [row[name] for row in result.history if name in row]
