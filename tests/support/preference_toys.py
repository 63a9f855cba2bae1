"""Rows of preferences, and a chat tokenizer, for the tests of learning from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from train_toys import WORDS, write_jsonl

# Messages as lines, each begun by its role and ended by a token of its own.
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Answers of different lengths, the chosen ones of words of the first half of the list."""
    rng = random.Random(seed)
    half = len(WORDS) // 2
    rows = []
    for _ in range(count):
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 3))) + ": "
        chosen = " ".join(rng.choices(WORDS[:half], k=rng.randint(1, 4)))
        rejected = " ".join(rng.choices(WORDS[half:], k=rng.randint(1, 4)))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def judged(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Single answers, every other one good."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(pairs(count, seed))
    ]


def pair_file(folder: Path, count: int = 12, seed: int = 0, name: str = "pairs.jsonl") -> str:
    return write_jsonl(folder / name, pairs(count, seed))
